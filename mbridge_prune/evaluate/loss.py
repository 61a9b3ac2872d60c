"""Next-token loss and perplexity on windows of text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.forward import Progress, combine, each_logits

CHUNK = 256
"""Positions whose logits stand in fp32 at a time."""


@dataclass
class Loss:
    """Mean next-token loss in nats, over how many predictions, at what speed."""

    loss: float
    predictions: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def loss(model: nn.Module, windows_ns: torch.Tensor, batch: int = 1) -> Loss:
    """Mean next-token loss over windows of text; arguments as in `token_losses`."""
    begin = time.monotonic()
    losses_np = token_losses(model, windows_ns, batch)
    seconds = max(time.monotonic() - begin, 1e-9)
    return Loss(float(losses_np.double().mean()), losses_np.numel(), windows_ns.numel() / seconds)


def token_losses(
    model: nn.Module,
    tokens_ns: torch.Tensor,
    batch: int = 1,
    deal: bool = True,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The loss of every next-token prediction, in nats.

    Args:
        model: an unwrapped Megatron model of this rank under any parallel layout, or a whole transformers
            model.
        tokens_ns: [n, s] int64, the same on every rank; each sequence is predicted from its own tokens alone.
        batch: sequences a microbatch; the result is the same bit for bit under any pipeline and data
            parallel layout with the same `batch`.
        deal: spread the sequences over data-parallel ranks; False computes all on each, for replicas of
            different models.

    Returns:
        [n, s - 1] fp32, on the device, the same on every rank (of a replica where `deal` is False).
    """
    n, s = tokens_ns.shape
    losses_np = torch.zeros(n, s - 1, device=runtime.device())

    def take(first: int, logits_bsv: torch.Tensor) -> None:
        logits_bsv = logits_bsv[:, :-1]
        wanted_bp = tokens_ns[first : first + len(logits_bsv), 1:].to(logits_bsv.device)
        for at in range(0, s - 1, CHUNK):
            part = slice(at, at + CHUNK)
            losses = F.cross_entropy(
                logits_bsv[:, part].flatten(0, 1).float(), wanted_bp[:, part].flatten(), reduction="none"
            )
            losses_np[first : first + len(wanted_bp), part] = losses.view(len(wanted_bp), -1)

    each_logits(model, tokens_ns, batch, take, deal=deal, progress=progress)
    return combine(model, losses_np, deal)


def windows(
    text: str, tokenizer: Any, length: int, limit: int | None = None, add_bos: bool = False
) -> torch.Tensor:
    """[windows, length] int64: the text cut into full windows, the rest left out.

    Args:
        add_bos: begin every window with the tokenizer's BOS (some models are useless without).
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if add_bos and tokenizer.bos_token_id is None:
        raise UserError("the tokenizer has no BOS token; leave --add-bos out")
    head = [tokenizer.bos_token_id] if add_bos else []
    body = length - len(head)
    n = len(ids) // body
    n = n if limit is None else min(n, limit)
    if n == 0:
        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    text_nb = torch.tensor(ids[: n * body]).view(n, body)
    return torch.cat([torch.tensor(head, dtype=torch.long).expand(n, len(head)), text_nb], dim=1)
