"""Perplexity of a Hugging Face model on text, in windows, as transformers loads it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Loss:
    """Mean next-token loss in nats, over how many predictions, at what speed."""

    loss: float
    predictions: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


@torch.no_grad()
def loss(model: Any, windows_ns: torch.Tensor, batch: int = 1) -> Loss:
    """Mean next-token loss of a transformers model over windows of text.

    Args:
        model: a causal language model of transformers.
        windows_ns: [windows, tokens] int64; each window is predicted from its own tokens alone.
    """
    model.eval()
    device = next(model.parameters()).device
    total, count, begin = 0.0, 0, time.monotonic()
    for ids_bs in windows_ns.split(batch):
        ids_bs = ids_bs.to(device)
        logits = model(ids_bs).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids_bs[:, 1:].flatten(), reduction="sum"
        )
        total += losses.double().item()
        count += ids_bs[:, 1:].numel()
    seconds = max(time.monotonic() - begin, 1e-9)
    return Loss(total / count, count, windows_ns.numel() / seconds)


def windows(text: str, tokenizer: Any, length: int, limit: int | None = None) -> torch.Tensor:
    """[windows, length] int64: the text cut into full windows, the rest left out."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n = len(ids) // length
    n = n if limit is None else min(n, limit)
    if n == 0:
        from mbridge_prune.errors import UserError

        raise UserError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    return torch.tensor(ids[: n * length]).view(n, length)
