"""The ready-made forward loop: text in, one pass of the model over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.calibration.packing import calibration_tokens, token_fingerprint
from mbridge_prune.calibration.schedule import forward_batches
from mbridge_prune.errors import UserError
from mbridge_prune.report.console import progress_bar


class CalibrationLoop:
    """`loop(model)` runs the calibration tokens through the model, without its output layer.

    Args:
        tokens_ns: [samples, sequence] int64.
        micro_batch_size: samples a microbatch.
        held_out_ns: [samples, sequence] of the same text, which this loop never runs: a search
            measures candidates on it.

    Attributes:
        fingerprint: of the tokens; a scores file remembers it.
    """

    def __init__(
        self,
        tokens_ns: torch.Tensor,
        micro_batch_size: int = 1,
        held_out_ns: torch.Tensor | None = None,
    ):
        if len(tokens_ns) % (micro_batch_size * runtime.size("dp")):
            raise UserError(
                f"{len(tokens_ns)} calibration samples do not divide into microbatches of "
                f"{micro_batch_size} on {runtime.size('dp')} data-parallel ranks; choose a multiple of "
                f"{micro_batch_size * runtime.size('dp')}"
            )
        self.tokens_ns = tokens_ns
        self.held_out_ns = held_out_ns
        self.micro_batch_size = micro_batch_size
        self.more: tuple[torch.Tensor, ...] = ()
        self.fingerprint = token_fingerprint(tokens_ns)

    def first(self, tokens: int) -> CalibrationLoop:
        """A loop over the first samples that hold so many tokens (all, if they hold fewer).

        Their number does not depend on the data-parallel ranks, but for those that share experts: they meet
        in every layer, and each must run as many microbatches.
        """
        each = self.micro_batch_size * (runtime.size("dp") if runtime.size("ep") > 1 else 1)
        samples = -(-tokens // (self.tokens_ns.shape[1] * each)) * each
        if samples >= len(self.tokens_ns):
            return self
        shorter = copy.copy(self)
        shorter.tokens_ns = self.tokens_ns[:samples]
        shorter.fingerprint = token_fingerprint(shorter.tokens_ns)
        return shorter

    def also(self, short_ns: torch.Tensor, batch: int) -> CalibrationLoop:
        """A loop that then runs sequences of another length, so many a microbatch; dealt out alike."""
        longer = copy.copy(self)
        longer.more = short_ns.split(batch)
        return longer

    def __call__(self, model: nn.Module) -> None:
        batches = [*self.tokens_ns.split(self.micro_batch_size), *self.more]
        left = len(self.tokens_ns)
        with progress_bar("calibration", left, "samples") as step:

            def seen(samples: int) -> None:  # what runs besides is no sample
                nonlocal left
                step(min(samples, left))
                left -= min(samples, left)

            forward_batches(model, batches, progress=seen)


def get_hf_mbridge_calibration_loop(
    *,
    model: Any,
    provider: Any,
    tokenizer: Any,
    hf_model_name_or_path: str | Path,
    dataset_name: str | Path,
    num_samples: int = 1024,
    seq_length: int | None = None,
    micro_batch_size: int = 1,
    split: str = "train",
    text_key: str = "text",
    apply_chat_template: bool = False,
    add_bos: bool = False,
    seed: int = 1234,
    held_out: int = 0,
) -> Callable[[nn.Module], None]:
    """A forward loop over text for `prune(config={"forward_loop": ...})`.

    Args:
        model: the list of model chunks, as `load_mbridge_model_from_hf` returns it (its embedding
            size bounds the token ids).
        provider: the Megatron-Bridge provider; its `seq_length` is the default length.
        tokenizer: the Hugging Face tokenizer.
        hf_model_name_or_path: where the model came from, for messages.
        dataset_name: a .txt/.jsonl/.parquet file, a folder of them, a token file
            (.npy/.safetensors), or a Hugging Face dataset name; several as "a,b" or "0.7,a,0.3,b".
        num_samples, seq_length: full sequences of text; documents are packed, nothing is padded.
        apply_chat_template: render `messages` with the tokenizer's chat template.
        held_out: so many further sequences are kept aside, for a search.
        add_bos: start every sequence with the BOS token (for models trained with it).

    Raises:
        UserError: the text cannot be read, is too short, or does not fit the model.
    """
    del model, hf_model_name_or_path
    tokens = calibration_tokens(
        dataset_name,
        tokenizer,
        num_samples + held_out,
        seq_length or provider.seq_length,
        split=split,
        text_key=text_key,
        chat_template=apply_chat_template,
        add_bos=add_bos,
        seed=seed,
        vocab_size=provider.vocab_size,
    )
    return CalibrationLoop(tokens[:num_samples], micro_batch_size, tokens[num_samples:])
