"""Importance of every axis, and what was kept of it: one figure for each hparam."""

from __future__ import annotations

from mbridge_prune.report.charts.sorted_units import sorted_units
from mbridge_prune.report.charts.spread import spread_by_layer
from mbridge_prune.report.charts.units import every_unit
from mbridge_prune.report.data import Axis, Run
from mbridge_prune.report.markup import Html

WHOLE_UNITS = ("num_query_groups", "num_attention_heads", "mamba_num_heads", "num_moe_experts")
"""hparams whose units are few and have a meaning of their own: each is drawn."""


def importance(run: Run) -> list[Html]:
    """The figures, in the order of plan.json's hparams."""
    figures = (_figure(run, hparam, axes) for hparam, axes in run.axes.items())
    return [figure for figure in figures if figure is not None]


def _figure(run: Run, hparam: str, axes: list[Axis]) -> Html | None:
    if hparam in WHOLE_UNITS:
        return every_unit(run, hparam, axes)
    if any(axis.scores is None for axis in axes):
        return None
    if len(axes) == 1 and not axes[0].place:
        return sorted_units(run, hparam, axes[0])
    return spread_by_layer(run, hparam, axes)
