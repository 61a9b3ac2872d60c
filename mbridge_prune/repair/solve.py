"""The least-squares problem of one weight, and how far a cut of it is from the full one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Tried for every weight: shares of each input channel's own size."""
TOKENS = 20
"""Tokens that a weight's fit needs for each input channel it keeps."""
ROWS = 8192
"""Rows of a weight that stand in fp64 at a time."""

HIDDEN_STATE, REMOVED_LAYERS = "hidden_state", "removed_layers"
"""Targets of a record: what a weight is fitted to, where that is not what it writes."""

Record = dict[str, Any]


def too_little_text(inputs: int, tokens: int, judging: int) -> str | None:
    """Why a weight cannot be fitted on so many tokens; None if it can.

    Args:
        judging: above zero if there are tokens that it can be judged on.
    """
    if tokens < TOKENS * inputs:
        return f"needs {TOKENS * inputs:,} calibration tokens"
    return None if judging else "needs 10 calibration samples, one to judge it on"


def verdict(record: Record, sliced: float, repaired: float) -> Record:
    """The record with both errors on samples kept for judging, and which of the two is taken."""
    record = {**record, "sliced_error": sliced, "repaired_error": repaired}
    if not repaired < sliced:
        return {**record, "repaired": False, "why": "no better on samples that the fit has not seen"}
    return {**record, "repaired": True}


def judged(
    new: Callable[[float], torch.Tensor], error: Callable[[torch.Tensor], float]
) -> tuple[float, float, torch.Tensor]:
    """The ridge whose weight has the least error on the judging share; that error, that weight."""
    tried = ((ridge, new(ridge)) for ridge in RIDGES)
    return min(((ridge, error(weight), weight) for ridge, weight in tried), key=lambda found: found[1])


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
    return ridge_solve(moment[kept][:, kept], moment[removed][:, kept], ridge)


def ridge_solve(moment: torch.Tensor, cross: torch.Tensor, ridge: float) -> torch.Tensor:
    """[m, k] fp64: cross (moment + ridge diag moment)^-1, for cross [m, k] and moment [k, k]."""
    size, inner = moment.diagonal(), moment.clone()
    # A channel that never fires has a zero row: a trace of the mean keeps the matrix positive.
    inner.diagonal().add_(ridge * size + 1e-9 * size.mean().clamp(min=1e-30))
    return torch.cholesky_solve(cross.t(), torch.linalg.cholesky(inner)).t()


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
