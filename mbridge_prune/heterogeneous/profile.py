"""The profile table: what the smallest, the middle and the largest candidate cost."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from mbridge_prune.heterogeneous.choices import Choices
from mbridge_prune.heterogeneous.costs import ForwardCosts
from mbridge_prune.search.budget import said


def profile(
    choices: Choices, costs: ForwardCosts, limits: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Subnet ("min", "centroid", "max") -> what it costs: flops, params, and what else is bounded."""
    places = {"min": lambda n: 0, "centroid": lambda n: (n - 1) // 2, "max": lambda n: n - 1}
    names = [*dict.fromkeys(("flops", "params", *limits))]
    found = {}
    for subnet, place in places.items():
        sizes = {key: choice[place(len(choice))] for key, choice in choices.items()}
        found[subnet] = {name: float(costs.of(name, sizes)) for name in names}
    return found


def profile_table(
    choices: Choices, profiled: Mapping[str, Mapping[str, float]], limits: Mapping[str, float]
) -> Table:
    """The profile, the bounds below it, and how many combinations there are."""
    combinations = math.prod(len(choice) for choice in choices.values())
    table = Table(title=f"profile: {len(choices)} axes, {combinations:.3g} combinations")
    names = list(profiled["max"])
    for column in ("subnet", *names):
        table.add_column(column, justify="left" if column == "subnet" else "right")
    for subnet, costs in profiled.items():
        table.add_row(subnet, *(_share(costs[n], profiled["max"][n]) for n in names))
    bounds = (_share(limits[n], profiled["max"][n]) if n in limits else "" for n in names)
    table.add_row("at most", *bounds, style="bold")
    return table


def _share(value: float, full: float) -> str:
    return f"{said(value)} ({value / full:.1%})" if full else said(value)
