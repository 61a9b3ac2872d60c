"""Ranks the units of every axis by the weights that read them."""

from __future__ import annotations

import torch

from mbridge_prune.dynamic.layout import Kept
from mbridge_prune.vision.table import Traced


def importance(traced: Traced) -> dict[str, torch.Tensor]:
    """Axis key -> [units] L2 norms of the weights that read each unit, summed over the layers that do."""
    channels = traced.channels
    keys = list(channels.axes)
    scores = {key: torch.zeros(axis.size) for key, axis in channels.axes.items()}
    for row in channels.rows:
        if not row.reads:
            continue
        weight = getattr(row.module, row.name).detach().float().cpu()
        squares_n = weight.square().movedim(row.dim, 0).flatten(1).sum(1)
        axis_n, unit_n = channels.units_of(row.ids_n)
        for number in axis_n[axis_n >= 0].unique().tolist():
            mine = axis_n == number
            squares_u = torch.zeros(channels.axes[keys[number]].size)
            squares_u.index_add_(0, unit_n[mine], squares_n[mine])
            scores[keys[number]] += squares_u.sqrt()
    return scores


def orders(traced: Traced) -> Kept:
    """Axis key -> [1, units]: descending importance; ties keep their order."""
    return {key: traced.table.axes[key].order_by(scores) for key, scores in importance(traced).items()}
