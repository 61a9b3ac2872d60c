"""What a probe accumulates from what it sees, and the scores that come out of the sums.

Every statistic is a sum of rows, so that microbatches, data-parallel ranks, pipeline stages and
shares of tensor- or expert-parallel ranks add up to the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Seen:
    """One call of a watched module.

    Args:
        x: what is watched: [s, b, c], or [tokens, c] of routed tokens, expert after expert.
        splits: tokens of every expert in `x`, where they are routed; None for one expert.
        valid: False at padded positions: [s, b], or [tokens]; None where all count.
    """

    x: torch.Tensor
    splits: Any = None
    valid: torch.Tensor | None = None


class SequenceMagnitude:
    """Sum over samples of (mean over the sequence of |x|)^2: [channels, 1]; score: its root.

    The accumulator of the Minitron papers (arXiv 2407.14679, 2504.03624). A unit of several channels
    is the L2 norm over them.
    """

    def rows(self, seen: Seen) -> torch.Tensor:
        x_sbc, valid_sb = seen.x, seen.valid
        if valid_sb is None:
            means_bc = _absolute_sum(x_sbc) / len(x_sbc)
        else:
            tokens_b = valid_sb.sum(0).clamp(min=1)
            means_bc = _absolute_sum(x_sbc * valid_sb[..., None]) / tokens_b[:, None]
        return means_bc.double().square().sum(0)[:, None]

    def score(self, sums: torch.Tensor, channels: int) -> torch.Tensor:
        return sums.view(-1, channels).sum(1).sqrt()


class RoutedMagnitude:
    """Sums over an expert's tokens of |x| and of 1: [experts, channels + 1]; score: their ratio.

    A mean over the tokens that were sent to the expert, however they came in batches; zero, which
    keeps the channels' order, for an expert that saw none.
    """

    def rows(self, seen: Seen) -> torch.Tensor:
        x = seen.x.reshape(-1, seen.x.shape[-1]).abs().float()
        ones = x.new_ones(len(x), 1)
        return _per_expert(torch.cat([x, ones], dim=1), seen)

    def score(self, sums: torch.Tensor, channels: int) -> torch.Tensor:
        return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).reshape(-1)


class RoutedNorm(RoutedMagnitude):
    """Mean over an expert's tokens of the L2 norm of its output (times its router probability)."""

    def rows(self, seen: Seen) -> torch.Tensor:
        norms = torch.linalg.vector_norm(seen.x.flatten(0, -2).float(), dim=-1, keepdim=True)
        return super().rows(Seen(norms, seen.splits, seen.valid))


Statistic = SequenceMagnitude | RoutedMagnitude
STATISTICS: dict[str, Statistic] = {
    "sequence_magnitude": SequenceMagnitude(),
    "routed_magnitude": RoutedMagnitude(),
    "routed_norm": RoutedNorm(),
}


def _per_expert(x_tc: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Sums of consecutive rows, so many for every expert: [experts, c] fp64, no host sync.

    A product with a 0/1 matrix, for adding by index is not deterministic on CUDA.
    """
    if seen.valid is not None:
        x_tc = x_tc * seen.valid[:, None]
    if seen.splits is None:
        return x_tc.sum(0, keepdim=True, dtype=torch.float64)
    splits = torch.as_tensor(seen.splits).to(x_tc.device, non_blocking=True)
    ends = splits.cumsum(0)
    token = torch.arange(len(x_tc), device=x_tc.device)
    belongs_et = (token < ends[:, None]) & (token >= (ends - splits)[:, None])
    return (belongs_et.to(x_tc.dtype) @ x_tc).double()


def _absolute_sum(x_sbc: torch.Tensor) -> torch.Tensor:
    """Sum over the sequence of |x| in fp32: [b, c].

    On a CPU a product with ones takes a fraction of vector_norm's time and rounds like it.
    """
    if x_sbc.device.type == "cpu" and x_sbc.dtype == torch.float32:
        ones_1s = x_sbc.new_ones(1, len(x_sbc))
        return (ones_1s @ x_sbc.abs().flatten(1)).view(x_sbc.shape[1:])
    return torch.linalg.vector_norm(x_sbc, 1, dim=0, dtype=torch.float32)
