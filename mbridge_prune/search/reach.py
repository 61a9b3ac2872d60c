"""Whether a budget can be kept at all, asked before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mbridge_prune import runtime
from mbridge_prune.dynamic import DEPTH, SliceTable
from mbridge_prune.errors import UserError
from mbridge_prune.search.budget import resolve, said
from mbridge_prune.search.costs import Costs

if TYPE_CHECKING:
    from mbridge_prune.search.run import Search


def check_reachable(search: Search) -> None:
    """Refuses a budget that the smallest candidate breaks, and one that the model keeps as it is.

    The layers are not ranked yet: it is taken that the largest go.

    Raises:
        UserError: with what the smallest candidate, or the model, costs.
    """
    order = _smallest_first(search.table)
    costs = search.costs(order)
    limits = resolve(search.budgets, costs)
    refuse_needless(limits, costs)
    smallest = search.table.settle(search.space(order).smallest())
    for name, limit in limits.items():
        least = float(costs.of(name, smallest))
        if least > limit:
            raise UserError(
                f"{name} at most {said(limit)} cannot be reached: the smallest candidate has {said(least)}; "
                "raise it, or widen the search with max_width_pruning, max_depth_pruning or divisors"
            )


def refuse_needless(limits: Mapping[str, float], costs: Costs) -> None:
    """A model that keeps every bound needs no search.

    Raises:
        UserError: with the model's own costs.
    """
    have = {name: float(costs.of(name, {})) for name in limits}
    if all(have[name] <= limit for name, limit in limits.items()):
        costs_now = ", ".join(f"{name} {said(have[name])} (at most {said(n)})" for name, n in limits.items())
        raise UserError(f"the model is inside the budget as it is: {costs_now}; nothing to prune")


def _smallest_first(table: SliceTable) -> list[int]:
    """Layers by their parameters, the smallest first, of all pipeline stages."""
    mine: dict[int, int] = {}
    for entry in table.entries:
        if entry.layer is not None and entry.counted:
            mine[entry.layer] = mine.get(entry.layer, 0) + entry.tensor().numel()
    sizes = {n: size for part in runtime.gather_objects(mine, "pp") for n, size in part.items()}
    return sorted(range(table.hparams()[DEPTH]), key=lambda n: (sizes.get(n, 0), n))
