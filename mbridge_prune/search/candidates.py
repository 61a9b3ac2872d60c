"""The candidates inside the budget, and the most promising of them, without holding the grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mbridge_prune.errors import UserError
from mbridge_prune.search.budget import said
from mbridge_prune.search.callables import allows
from mbridge_prune.search.costs import Costs
from mbridge_prune.search.space import Grid, Space, as_sizes

KEPT = 20_000
CLOUD = 1_500


@dataclass
class Candidates:
    """What is inside the budget.

    Args:
        grid: real candidates, twins left out.
        inside: of these, how many keep every bound.
        best: up to 20,000 of them, in descending promise: sizes, costs and predicted loss.
        cloud: a seeded sample for the plot: "params" and "predicted".
    """

    grid: int
    inside: int
    best: Grid
    predicted: np.ndarray
    params: np.ndarray
    cloud: dict[str, list[float]] = field(default_factory=dict)

    def sizes(self, place: int) -> dict[str, int]:
        return as_sizes(self.best, place)


def inside_budget(
    space: Space,
    costs: Costs,
    limits: Mapping[str, float],
    predict: Callable[[Grid], np.ndarray],
    wanted: Callable[[dict[str, int]], bool] | None = None,
    seed: int = 0,
) -> Candidates:
    """Counts the whole grid, chunk by chunk, and keeps the best inside the bounds.

    Args:
        limits: budget -> upper bound.
        predict: predicted loss of every candidate of a chunk, lower is better.
        wanted: the user's filter. It is asked about a chunk's candidates from the best on, until 20,000 are
            found, or none is left that could be among the best.

    Raises:
        UserError: nothing is inside, with the smallest cost that can be reached.
    """
    best: dict[str, np.ndarray] = {}
    total = inside = 0
    lowest = {name: float("inf") for name in limits}
    sampled: list[tuple[np.ndarray, np.ndarray]] = []
    random = np.random.default_rng(seed)
    for chunk in space.grid():
        n = len(next(iter(chunk.values())))
        total += n
        fits = np.ones(n, dtype=bool)
        for name, limit in limits.items():
            cost = np.broadcast_to(costs.of(name, chunk), n)
            lowest[name] = min(lowest[name], float(cost.min())) if n else lowest[name]
            fits &= cost <= limit
        if not fits.any():
            continue
        chunk = {name: sizes[fits] for name, sizes in chunk.items()}
        inside += int(fits.sum())
        rows = {
            **chunk,
            "_params": np.broadcast_to(costs.params(chunk), int(fits.sum())),
            "_predicted": predict(chunk),
        }
        take = random.permutation(int(fits.sum()))[:CLOUD]
        sampled.append((rows["_params"][take], rows["_predicted"][take]))
        if wanted is not None:
            rows = _allowed(rows, wanted, best)
        best = {k: np.concatenate([best[k], v]) if best else np.asarray(v) for k, v in rows.items()}
        best = _take(best, _best_first(best)[:KEPT])
    if not inside:
        raise UserError(_nothing_inside(limits, lowest))
    if not len(best["_params"]):
        raise UserError(f"candidate_filter refused each of the {inside:,} candidates inside the budget")
    points = [np.concatenate(part) for part in zip(*sampled, strict=True)]
    take = random.permutation(len(points[0]))[:CLOUD]
    cloud = {"params": points[0][take].tolist(), "predicted": points[1][take].round(6).tolist()}
    predicted, params = best.pop("_predicted"), best.pop("_params")
    return Candidates(total, inside, best, predicted, params, cloud)


def _best_first(rows: Grid) -> np.ndarray:
    """The order of promise. Ties go to the larger model, then to the order of the grid."""
    return np.lexsort((np.arange(len(rows["_params"])), -rows["_params"], rows["_predicted"]))


def _take(rows: Grid, places: np.ndarray | list[int]) -> Grid:
    return {name: values[places] for name, values in rows.items()}


def _allowed(rows: Grid, wanted: Callable[[dict[str, int]], bool], best: Grid) -> Grid:
    """The candidates of a chunk that the filter lets through, in their order, as far as they count."""
    enough = bool(best) and len(best["_predicted"]) >= KEPT
    names = [name for name in rows if not name.startswith("_")]
    grid = {name: rows[name] for name in names}
    passed: list[int] = []
    for place in _best_first(rows):
        if len(passed) == KEPT or (enough and rows["_predicted"][place] > best["_predicted"][-1]):
            break
        if allows(wanted, as_sizes(grid, place)):
            passed.append(int(place))
    return _take(rows, np.array(sorted(passed), dtype=int))


def _nothing_inside(limits: Mapping[str, float], lowest: Mapping[str, Any]) -> str:
    bounds = "; ".join(
        f"{name} at most {said(limit)}, the smallest candidate has {said(lowest[name])}"
        for name, limit in limits.items()
    )
    return (
        f"no candidate is inside the budget ({bounds}); raise it, or widen the search with "
        "max_width_pruning, max_depth_pruning or finer divisors"
    )
