"""The least-squares problem of one weight, and how far a cut of it is from the full one."""

from __future__ import annotations

import torch

ROWS = 8192
"""Rows of a weight that stand in fp64 at a time."""


def carried_over(moment: torch.Tensor, kept: torch.Tensor, ridge: float) -> torch.Tensor:
    """What removed input channels are made of, in kept ones: B with x_R ~ B x_S.

    B = C_RS (C_SS + ridge diag C_SS)^-1, the ridge regression of the removed channels on the kept ones;
    the ridge scales with each channel's own size.

    Args:
        moment: [n, n] fp64, C = sum over tokens of x x^T.
        kept: [k] int64, S.

    Returns:
        [n - k, k] fp64, removed channels in ascending order.
    """
    removed = others(kept, len(moment))
    inner = moment[kept][:, kept]
    size = inner.diagonal()
    # A channel that never fires has a zero row: a trace of the mean keeps the matrix positive.
    inner = inner + torch.diag(ridge * size + 1e-9 * size.mean().clamp(min=1e-30))
    return torch.cholesky_solve(moment[kept][:, removed], torch.linalg.cholesky(inner)).t()


def refit(weight: torch.Tensor, kept: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
    """[out, k] fp64: the kept columns of a weight plus what the removed ones did through them."""
    removed = others(kept, weight.shape[1])
    parts = (part.double() for part in weight.split(ROWS))
    return torch.cat([part[:, kept] + part[:, removed] @ carried for part in parts])


def output_error(
    weight: torch.Tensor, kept: torch.Tensor, columns: torch.Tensor, moment: torch.Tensor
) -> float:
    """Squared error of what a cut weight writes, as a share of what the full one writes.

    Args:
        weight: [out, n], the full one.
        columns: [out, k], what the cut one has at `kept`.
        moment: [n, n] fp64 over the tokens it is judged on.
    """
    missed, whole = 0.0, 0.0
    for full, cut in zip(weight.split(ROWS), columns.split(ROWS), strict=True):
        full = full.double()
        apart = full.clone()
        apart[:, kept] -= cut.double()
        missed += float((apart @ moment * apart).sum())
        whole += float((full @ moment * full).sum())
    return missed / whole if whole else 0.0


def others(kept: torch.Tensor, n: int) -> torch.Tensor:
    """[n - k] int64: the indices below `n` that are not kept, ascending."""
    mask = torch.ones(n, dtype=torch.bool, device=kept.device)
    mask[kept] = False
    return mask.nonzero().flatten()
