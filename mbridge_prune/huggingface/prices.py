"""From scores to what the search reads: what each size of each axis loses, a unit of the budget.

The loss that a cut adds is, to second order and without the terms between units, the sum of the scores of
the units that go; what it saves is the sum of their costs. The least loss inside a budget is where every axis
is cut up to the same price: the loss that its next step adds over what the step saves. So the search, which
finds the level that all axes have to tolerate, is given prices.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mbridge_prune.dynamic import SliceTable


def losses(
    table: SliceTable, units: Mapping[str, torch.Tensor], choices: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, float]]:
    """Axis key -> {size: sum of the scores of the units that go}; the least important go first."""
    found = {}
    for key, sizes in choices.items():
        ascending = np.sort(units[key].double().cpu().numpy())
        lost = np.concatenate([[0.0], np.cumsum(ascending)])
        found[key] = {size: float(lost[table.axes[key].size - size]) for size in sizes}
    return found


def prices(
    lost: Mapping[str, Mapping[int, float]],
    cost: Callable[[str, Mapping[str, Any]], Any],
    budgets: Iterable[str],
) -> dict[str, dict[int, float]]:
    """Axis key -> {size: the price at which the axis shrinks to it}; it rises as the axis gets smaller.

    Where a step is cheaper than the one before it (steps of unequal length), both are one step.

    Args:
        lost: of every size; the full size loses nothing.
        cost: cost(budget, {axis key: sizes}), of many sizes at once; blocks do not share a cost.
        budgets: a step saves the mean of its shares of the model's costs (operations stand for a measured
            time).

    Returns:
        Loss added for a share of the model saved.
    """
    names = list(dict.fromkeys("flops" if name == "latency_ms" else name for name in budgets))
    found = {}
    for key, by_size in lost.items():
        sizes = np.array(sorted(by_size, reverse=True))
        spent = np.zeros(len(sizes))
        for name in names:
            spent += np.broadcast_to(cost(name, {key: sizes}), len(sizes)) / cost(name, {}) / len(names)
        levels = _hull(spent[0] - spent, np.array([by_size[n] for n in sizes]))
        found[key] = dict(zip(sizes.tolist(), levels, strict=True))
    return found


def _hull(saved: np.ndarray, lost: np.ndarray) -> list[float]:
    """Slopes of the lower convex hull of (saved, lost), of the piece that ends at or spans each point."""
    corners = [0]
    for i in range(1, len(saved)):
        while len(corners) > 1 and _slope(saved, lost, corners[-1], i) <= _slope(saved, lost, *corners[-2:]):
            corners.pop()
        corners.append(i)
    levels = [0.0]
    for begin, end in itertools.pairwise(corners):
        levels += [_slope(saved, lost, begin, end)] * (end - begin)
    return levels


def _slope(saved: np.ndarray, lost: np.ndarray, begin: int, end: int) -> float:
    return float((lost[end] - lost[begin]) / max(saved[end] - saved[begin], 1e-300))
