"""Data and loss of a model's own task, told by its class: classifier, causal or masked language model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_prune.calibration.packing import calibration_tokens
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.huggingface.settings import Data

MASKED = 0.15
"""Share of the tokens that a masked language model has to find."""
IGNORED = -100
"""A label that no loss is taken of."""


@dataclass(frozen=True)
class Task:
    """What `prune(mode="gradnas", config=...)` is given."""

    batches: Iterable[Any]
    loss: Callable[[Any, Any], torch.Tensor]
    collect: Callable[[Any], Any] | None = None


def own_loss(output: Any, batch: Any) -> torch.Tensor:
    """The loss that a transformers model computes where it is given labels."""
    del batch
    if getattr(output, "loss", None) is None:
        raise UserError("the model gave no loss of its own: its batches need labels, or give --loss-func")
    return output.loss


def task_of(model: nn.Module, tokenizer: Any, data: Data) -> Task:
    """The task that `model`'s class says, on `data.path`.

    Raises:
        UserError: a class without a task of its own, or data that do not fit it.
    """
    if tokenizer is None:
        raise UserError("the model has no tokenizer beside it: give --data-loader module:function")
    name = type(model).__name__
    if name.endswith("ForSequenceClassification"):
        return Task(_labelled(model, tokenizer, data), own_loss)
    if name.endswith("ForMaskedLM"):
        parts = enumerate(_sequences(model, tokenizer, data))
        return Task([_masked(ids, tokenizer, data, number) for number, ids in parts], own_loss)
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        batches = _sequences(model, tokenizer, data)
        return Task([{"input_ids": ids, "labels": ids} for ids in batches], own_loss)
    raise UserError(
        f"{name} has no task that is known here (ForSequenceClassification, ForMaskedLM and ForCausalLM "
        "have): give --data-loader module:function and --loss-func module:function"
    )


def _sequences(model: Any, tokenizer: Any, data: Data) -> Sequence[torch.Tensor]:
    """Batches of packed text: [batch, sequence] token ids."""
    return calibration_tokens(
        str(data.path), tokenizer, data.num_samples, data.seq_length, text_key=data.text_key, seed=data.seed,
        vocab_size=model.get_input_embeddings().weight.shape[0],
    ).split(data.batch_size)  # fmt: skip


def _masked(ids: torch.Tensor, tokenizer: Any, data: Data, number: int) -> dict[str, torch.Tensor]:
    """A batch in which some tokens are replaced by the mask token and have to be found."""
    if tokenizer.mask_token_id is None:
        raise UserError("the tokenizer of a masked language model needs a mask token, this one has none")
    draw = torch.Generator().manual_seed(data.seed + number)
    hidden = torch.rand(ids.shape, generator=draw) < MASKED
    hidden[:, 0] |= ~hidden.any(dim=1)
    labels = ids.masked_fill(~hidden, IGNORED)
    return {"input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id), "labels": labels}


def _labelled(model: nn.Module, tokenizer: Any, data: Data) -> list[Any]:
    """Batches of the first examples of a .jsonl file, padded to their longest."""
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer of a classifier needs a padding token, this one has none")
    examples = list(_examples(Path(str(data.path)).expanduser(), model.config, data))
    batches = []
    for first in range(0, len(examples), data.batch_size):
        texts, pairs, labels = zip(*examples[first : first + data.batch_size], strict=True)
        batch = tokenizer(
            list(texts), list(pairs) if data.text_pair_key else None, truncation=True, padding=True,
            max_length=data.seq_length, return_tensors="pt",
        )  # fmt: skip
        batch["labels"] = torch.tensor(labels)
        batches.append(batch)
    return batches


def _examples(path: Path, config: Any, data: Data) -> Iterator[tuple[str, str | None, int | float]]:
    """(text, second text, label) of the first records, each checked."""
    if path.suffix != ".jsonl" or not path.is_file():
        raise UserError(
            f"--data {path}: classifiers read a .jsonl file of records with {data.text_key!r} and "
            f"{data.label_key!r}"
        )
    keys = [key for key in (data.text_key, data.text_pair_key, data.label_key) if key]
    found = 0
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if found == data.num_samples:
                return
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{where}: broken JSON: {error}") from error
            has = list(record) if isinstance(record, dict) else []
            lacking = [key for key in keys if key not in has]
            if lacking:
                hint = nearest(lacking[0], has)
                raise UserError(f"{where}: no key {lacking[0]!r}{hint}; keys: {', '.join(has) or 'none'}")
            pair = record[data.text_pair_key] if data.text_pair_key else None
            yield str(record[data.text_key]), pair, _label(record[data.label_key], config, where)
            found += 1
    if not found:
        raise UserError(f"{path} holds no record")


def _label(value: Any, config: Any, where: str) -> int | float:
    """A class number; a number as it is where the model predicts one."""
    if config.num_labels == 1 and isinstance(value, (int, float)):
        return float(value)
    names = {str(name): number for name, number in (config.label2id or {}).items()}
    number = names.get(value) if isinstance(value, str) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < config.num_labels:
        raise UserError(
            f"{where}: {value!r} is no label of the model{nearest(value, names)}; it has 0 to "
            f"{config.num_labels - 1}: {', '.join(names)}"
        )
    return number
