"""Budgets: upper bounds on what a candidate costs, as numbers or as percentages of the full model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mbridge_prune.dynamic import Sizes
from mbridge_prune.errors import UserError, nearest

BUDGETS = ("params", "active_params", "memory_mb", "flops")


class Costs(Protocol):
    """What counts candidates."""

    def of(self, budget: str, sizes: Sizes, /) -> Any:
        """The cost that a budget bounds."""


def parse_budget(name: str, value: Any, full: float | None = None) -> float:
    """A bound as a number.

    Args:
        value: a number (6e9, "6e9") or a percentage of the full model ("70%").
        full: the full model's cost; None checks the form alone and leaves a percentage as a share.

    Raises:
        UserError: neither, or not positive.
    """
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) * (0.01 if text.endswith("%") else 1)
    except ValueError as error:
        raise UserError(f"{name}={value!r} is no budget: give a number (6e9) or a share (70%)") from error
    if isinstance(value, bool) or not number > 0 or number == float("inf"):
        raise UserError(f"{name}={value!r} is no budget: it must be above 0")
    if not text.endswith("%") or full is None:
        return number
    return number * full


def budgets_of(constraints: Mapping[str, Any], names: Sequence[str] = BUDGETS) -> dict[str, Any]:
    """The budgets among the constraints, in their order, with their form checked.

    Args:
        names: of the budgets that the mode knows.

    Raises:
        UserError: an unknown constraint, or a target given by hand as well.
    """
    known = (*names, "export_config")
    for name in constraints:
        if name not in known:
            raise UserError(
                f"unknown constraint {name!r}{nearest(name, known)}; give "
                f"{{'export_config': {{hparam: size}}}} or budgets: {', '.join(names)}"
            )
    budgets = {name: constraints[name] for name in constraints if name in names}
    if budgets and "export_config" in constraints:
        raise UserError("constraints give both an export_config and a budget: a target by hand, or a search")
    for name, value in budgets.items():
        parse_budget(name, value)
    return budgets


def resolve(budgets: Mapping[str, Any], costs: Costs) -> dict[str, float]:
    """Bounds in numbers; percentages are of the full model."""
    return {name: parse_budget(name, value, float(costs.of(name, {}))) for name, value in budgets.items()}


def said(value: float) -> str:
    """A cost in words: whole where it is large."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
