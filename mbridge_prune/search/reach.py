"""Whether a budget can be kept at all, asked before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mbridge_prune.dynamic import DEPTH
from mbridge_prune.errors import UserError
from mbridge_prune.search import budget as budgets
from mbridge_prune.search.budget import resolve, said
from mbridge_prune.search.costs import Costs

if TYPE_CHECKING:
    from mbridge_prune.search.run import Search


def check_reachable(search: Search) -> None:
    """Refuses a budget that no candidate keeps, and one that the model keeps as it is.

    The layers are not ranked yet: of each budget it is taken that the layers that cost it least remain,
    a lower bound on every candidate.

    Raises:
        UserError: with what the smallest candidate, or the model, costs.
    """
    order = list(range(search.table.hparams()[DEPTH]))
    costs = search.costs(order)
    limits = resolve(search.budgets, costs)
    refuse_needless(limits, costs)
    smallest = search.table.settle(search.space(order).smallest())
    for name, limit in limits.items():
        least = least_cost(costs, name, smallest)
        if least > limit:
            raise UserError(
                f"{name} at most {said(limit)} cannot be reached: the smallest candidate has {said(least)}; "
                "raise it, or widen the search with max_width_pruning, max_depth_pruning or divisors"
            )


def least_cost(costs: Costs, budget: str, sizes: Mapping[str, int]) -> float:
    """The cost of `sizes` where the layers remain that cost this budget least."""
    by_depth = np.asarray(
        costs.of(budget, {**sizes, DEPTH: np.arange(costs.weights.layers + 1)}), dtype=float
    )
    layers = np.sort(np.diff(by_depth))
    return float(by_depth[0] + layers[: sizes[DEPTH]].sum())


def refuse_needless(limits: Mapping[str, float], costs: budgets.Costs) -> None:
    """A model that keeps every bound needs no search.

    Raises:
        UserError: with the model's own costs.
    """
    have = {name: float(costs.of(name, {})) for name in limits}
    if all(have[name] <= limit for name, limit in limits.items()):
        costs_now = ", ".join(f"{name} {said(have[name])} (at most {said(n)})" for name, n in limits.items())
        raise UserError(f"the model is inside the budget as it is: {costs_now}; nothing to prune")
