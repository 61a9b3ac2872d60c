"""What a probe accumulates from what it sees, and the scores that come out of the sums.

Every statistic is a sum of rows, so that microbatches, data-parallel ranks, pipeline stages and
shares of tensor- or expert-parallel ranks add up to the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass
class Seen:
    """One call of a watched module.

    Args:
        x: what is watched: [s, b, c], or [tokens, c] of routed tokens, expert after expert.
        splits: tokens of every expert in `x`, where they are routed; None for one expert.
        valid: False at padded positions: [s, b], or [tokens]; None where all count.
        gates: [tokens], the router probabilities that are in `x` and shall not be; None leaves them in.
    """

    x: torch.Tensor
    splits: Any = None
    valid: torch.Tensor | None = None
    gates: torch.Tensor | None = None


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
        return _per_expert(seen.x.reshape(-1, seen.x.shape[-1]), seen)

    def score(self, sums: torch.Tensor, channels: int) -> torch.Tensor:
        return (sums[:, :-1] / sums[:, -1:].clamp(min=1)).reshape(-1)


class RoutedNorm(RoutedMagnitude):
    """Mean over an expert's tokens of the L2 norm of its output, times its router probability or without.

    With it: the criterion of REAP, arXiv 2510.13999. Without it: the expert activation norm of arXiv
    2504.05586, as a mean over the expert's tokens. Megatron multiplies an expert's activation and its bias
    by the probability, and fc2 is linear: the norm is divided by it. A token of probability zero says
    nothing of the output and counts as none.
    """

    def rows(self, seen: Seen) -> torch.Tensor:
        x_tc = seen.x.flatten(0, -2)
        norms_t1 = torch.linalg.vector_norm(x_tc, dim=-1, keepdim=True, dtype=torch.float32)
        if seen.gates is not None:
            gates_t = seen.gates.reshape(-1).float().abs()
            told = gates_t > 0
            norms_t1 = norms_t1 / torch.where(told, gates_t, torch.inf)[:, None]
            seen = replace(seen, valid=told if seen.valid is None else seen.valid & told)
        return _per_expert(norms_t1, seen, signed=False)


Statistic = SequenceMagnitude | RoutedMagnitude
STATISTICS: dict[str, Statistic] = {
    "sequence_magnitude": SequenceMagnitude(),
    "routed_magnitude": RoutedMagnitude(),
    "routed_norm": RoutedNorm(),
}


def _per_expert(x_tc: torch.Tensor, seen: Seen, signed: bool = True) -> torch.Tensor:
    """Sums of |x| over the consecutive rows of every expert, and their number: [experts, c + 1] fp64.

    Args:
        signed: False says that no x is negative.
    """
    if seen.valid is not None:
        ones_t1 = seen.valid[:, None].to(x_tc.dtype)
        return _sums(torch.cat([x_tc * ones_t1, ones_t1], dim=1), seen.splits, signed).double()
    sums_ec = _sums(x_tc, seen.splits, signed).double()
    if seen.splits is None:
        return nn.functional.pad(sums_ec, (0, 1), value=len(x_tc))
    tokens_e = torch.as_tensor(seen.splits, dtype=torch.float64).to(x_tc.device, non_blocking=True)
    return torch.cat([sums_ec, tokens_e[:, None]], dim=1)


def _sums(x_tc: torch.Tensor, splits: Any, signed: bool) -> torch.Tensor:
    """[experts, c] fp32, without asking a device for a number."""
    if splits is None:
        return (x_tc.abs() if signed else x_tc).sum(0, keepdim=True, dtype=torch.float32)
    if x_tc.device.type == "cpu":  # the rows of one expert fit a cache, those of all do not
        parts = x_tc.split(torch.as_tensor(splits).tolist())
        return torch.stack([(p.abs() if signed else p).sum(0, dtype=torch.float32) for p in parts])
    splits_e = torch.as_tensor(splits).to(x_tc.device, non_blocking=True)
    return _product(_belongs(splits_e, len(x_tc)), x_tc.abs() if signed else x_tc)


def _belongs(splits_e: torch.Tensor, tokens: int) -> torch.Tensor:
    """[experts, tokens] bool: which of the consecutive rows are an expert's."""
    ends_e = splits_e.cumsum(0)
    token_t = torch.arange(tokens, device=splits_e.device)
    return (token_t < ends_e[:, None]) & (token_t >= (ends_e - splits_e)[:, None])


def _product(belongs_et: torch.Tensor, x_tc: torch.Tensor) -> torch.Tensor:
    """Rows of x added up in fp32, as a matrix product: adding by index is not deterministic on CUDA.

    Half precision stays as it is where cuBLAS can add it up in fp32: no copy of x, and tensor cores.
    """
    if x_tc.dtype in (torch.bfloat16, torch.float16) and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(belongs_et.to(x_tc.dtype), x_tc, out_dtype=torch.float32)
    return belongs_et.float() @ x_tc.float()


def _absolute_sum(x_sbc: torch.Tensor) -> torch.Tensor:
    """Sum over the sequence of |x| in fp32: [b, c]."""
    if x_sbc.device.type == "cpu":  # two passes in a tenth of vector_norm's time
        return x_sbc.abs().sum(0, dtype=torch.float32)
    return torch.linalg.vector_norm(x_sbc, 1, dim=0, dtype=torch.float32)
