"""The architecture inside a budget that loses the least on its most sensitive axis.

Every axis gets the smallest size whose drop is tolerated. The more is tolerated, the less the candidate
costs: bisection over the drops that were measured finds the least tolerance that keeps the budget. What the
budget then leaves is given back to the axes that gain most by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous.choices import Choices
from mbridge_prune.search.budget import said

Drops = Mapping[str, Mapping[int, float]]
"""Axis key -> {size: what the score loses with this axis alone at this size}; at its full size, nothing."""
Cost = Callable[[str, Mapping[str, "int | np.ndarray"]], "int | float | np.ndarray"]
"""cost(budget, sizes); of several candidates at once where sizes are arrays."""


@dataclass(frozen=True)
class Found:
    """The architecture of a search.

    Args:
        sizes: axis key -> size, of every axis.
        allowed_drop: the least tolerance that keeps the budget; None where only the smallest candidate does.
        tolerated: the sizes before the rest of the budget was given back.
        costs: budget -> what the architecture costs.
    """

    sizes: dict[str, int]
    allowed_drop: float | None
    tolerated: dict[str, int]
    costs: dict[str, float]


def monotone(choices: Choices, drops: Drops) -> dict[str, dict[int, float]]:
    """The drops such that less of an axis never costs less, and no cut gains.

    Raises:
        ValueError: a choice has no drop, or one that is not a number.
    """
    found: dict[str, dict[int, float]] = {}
    for key, sizes in choices.items():
        worst, found[key] = 0.0, {sizes[-1]: 0.0}
        for size in reversed(sizes[:-1]):
            drop = float(drops[key][size]) if size in drops.get(key, {}) else float("nan")
            if not np.isfinite(drop):
                raise ValueError(f"{key}: no drop at {size}")
            worst = max(worst, drop)
            found[key][size] = worst
    return found


def search(
    choices: Choices,
    drops: Drops,
    cost: Cost,
    limits: Mapping[str, float],
    fill: bool = True,
    worth: Drops | None = None,
) -> Found:
    """The sizes with the least tolerated drop that keep every limit.

    Args:
        drops: of every choice but the full sizes.
        cost: must not rise when an axis gets smaller, but for measured times.
        limits: budget -> upper bound.
        fill: give back what the budget leaves. Not where a cost is a measured time: each try would be a run.
        worth: what a step that is given back is worth, where the drops are no losses but levels.

    Raises:
        UserError: not even the smallest sizes keep the limits.
    """
    drops = monotone(choices, drops)
    levels = sorted({0.0, *(drop for by_size in drops.values() for drop in by_size.values())})

    def tolerating(level: float) -> dict[str, int]:
        return {key: min(n for n, drop in drops[key].items() if drop <= level) for key in choices}

    def fits(sizes: Mapping[str, int]) -> bool:
        return all(float(cost(name, sizes)) <= limit for name, limit in limits.items())

    low, high = 0, len(levels)  # the level sought is in low..high; high: none of them
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(tolerating(levels[middle])) else (middle + 1, high)
    allowed = levels[low] if low < len(levels) else None
    tolerated = tolerating(levels[low]) if allowed is not None else {k: s[0] for k, s in choices.items()}
    if allowed is None and not fits(tolerated):
        raise UserError(_unreachable(choices, cost, limits))
    sizes = (
        _filled(choices, drops if worth is None else monotone(choices, worth), cost, limits, tolerated)
        if fill
        else dict(tolerated)
    )
    return Found(sizes, allowed, tolerated, {name: float(cost(name, sizes)) for name in limits})


def check_reachable(choices: Choices, cost: Cost, limits: Mapping[str, float]) -> None:
    """Refuses limits that the smallest sizes do not keep.

    Raises:
        UserError: with the range that can be reached.
    """
    smallest = {key: sizes[0] for key, sizes in choices.items()}
    if any(float(cost(name, smallest)) > limit for name, limit in limits.items()):
        raise UserError(_unreachable(choices, cost, limits))


def _unreachable(choices: Choices, cost: Cost, limits: Mapping[str, float]) -> str:
    ends = [{key: sizes[end] for key, sizes in choices.items()} for end in (0, -1)]
    bounds = "; ".join(
        f"{name} at most {said(limit)}, the choices reach from {said(float(cost(name, ends[0])))} to "
        f"{said(float(cost(name, ends[1])))}"
        for name, limit in limits.items()
    )
    return f"no candidate keeps the budget ({bounds}); raise it, or allow smaller sizes"


def _filled(
    choices: Choices,
    drops: Mapping[str, Mapping[int, float]],
    cost: Cost,
    limits: Mapping[str, float],
    start: Mapping[str, int],
) -> dict[str, int]:
    """One step up at a time, on the axis that loses most, as long as one fits; of equals, the cheapest."""
    sizes = dict(start)
    while True:
        open_ = [key for key in choices if sizes[key] < choices[key][-1]]
        if not open_:
            return sizes
        raised = {key: choices[key][list(choices[key]).index(sizes[key]) + 1] for key in open_}
        rows = {k: np.array([raised[k] if k == up else n for up in open_]) for k, n in sizes.items()}
        costs = {name: np.broadcast_to(cost(name, rows), len(open_)) for name in limits}
        fitting = np.all([costs[name] <= limit for name, limit in limits.items()], axis=0)
        if not fitting.any():
            return sizes
        gains = [drops[key][sizes[key]] - drops[key][raised[key]] for key in open_]
        first = next(iter(limits))
        best = min(np.flatnonzero(fitting), key=lambda i: (-gains[i], costs[first][i], i))
        sizes[open_[best]] = raised[open_[best]]
