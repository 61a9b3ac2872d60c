"""The settings of launch/prune_hf.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mbridge_prune import config
from mbridge_prune.config import RECIPES, option
from mbridge_prune.heterogeneous.settings import Budget, Output, RunFolder


@dataclass(kw_only=True)
class Data:
    """What the loss is measured on: examples of the task that the model is for."""

    path: str | None = option(
        None, "classifiers: .jsonl of texts and labels; language models: text as for prune.py", "--data"
    )
    num_samples: int = option(1024, "examples, or full sequences of text", "--num-samples")
    seq_length: int = option(
        128,
        "tokens at most of an example, all of a sequence, and of the forward that is counted",
        "--seq-length",
    )
    batch_size: int = option(8, "examples a batch", "--batch-size")
    text_key: str = option("text", "key of the text in a record", "--text-key")
    text_pair_key: str | None = option(None, "key of the second text, for pairs", "--text-pair-key")
    label_key: str = option("label", "key of the label: a number, or a name of the model's", "--label-key")
    seed: int = option(1234, "order of the documents, places of masks", "--seed")
    loader: str | None = option(
        None, "module:function(model, tokenizer) -> batches, in place of --data", "--data-loader"
    )
    loss: str | None = option(
        None, "module:function(model output, batch) -> loss (default: the model's own)", "--loss-func"
    )
    collect: str | None = option(None, "module:function(batch) -> the model's input", "--collect-func")


@dataclass(kw_only=True)
class Prune:
    """What may be cut."""

    num_attention_heads_divisor: int = option(1, "heads are multiples of it", "--num-attention-heads-divisor")
    ffn_hidden_size_divisor: int = option(64, "FFN sizes are multiples of it", "--ffn-hidden-size-divisor")
    max_pruning: float = option(0.95, "largest share of an axis that may go", "--max-pruning")
    axes_to_skip: list[str] = option([], "axes (or patterns) that keep their size", "--axes-to-skip")


@dataclass(kw_only=True)
class Settings(RunFolder):
    """All settings of `launch/prune_hf.py`."""

    PROGRAM: ClassVar[str] = "prune_hf.py"
    DESCRIPTION: ClassVar[str] = "Prunes a transformers model with GradNAS, every layer to a size of its own."
    EXAMPLE: ClassVar[str] = "prune.ffn_hidden_size_divisor=32"
    RECIPES: ClassVar[Path] = RECIPES / "huggingface"

    model: config.Model = field(default_factory=config.Model)
    data: Data = field(default_factory=Data)
    prune: Prune = field(default_factory=Prune)
    search: Budget = field(default_factory=Budget)
    output: Output = field(default_factory=Output)
