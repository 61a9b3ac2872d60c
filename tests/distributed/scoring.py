"""Score functions of a user, for searches on several ranks; each call is told to a file of its rank in $CALLS."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from mbridge_prune.evaluate.loss import token_losses


def loss(model: nn.Module) -> float:
    """The library's own loss, which deals its text out to the data-parallel replicas where they work together."""
    rank = os.environ.get("RANK", "0")
    with (Path(os.environ["CALLS"]) / rank).open("a") as file:
        file.write(f"{sum(p.numel() for p in model.parameters())}\n")
    tokens_ns = torch.arange(3, 99).view(8, 12)
    return -float(token_losses(model, tokens_ns).double().mean())


def together(model: nn.Module) -> float:
    """The same, called by all ranks for every candidate."""
    return loss(model)


def fails_on_the_last_stage(model: nn.Module) -> float:
    """As a function that reads the logits does, which the other stages do not have."""
    if model.post_process:
        raise ZeroDivisionError("no questions")
    return 0.0


together.together = True  # type: ignore[attr-defined]
