"""Every head, group or expert of every layer: how important it is there, and whether it was kept."""

from __future__ import annotations

import numpy as np

from mbridge_prune.report.charts.naming import WORDS, column_name, names, observed, removed_columns, title
from mbridge_prune.report.data import Axis, Run
from mbridge_prune.report.markup import Html, numbers, table
from mbridge_prune.report.numbers import DASH, counted, exact, ranges
from mbridge_prune.report.plot import SIDE, Bands, Plot, figure, legend

INSIDE = {"num_attention_heads": "query group", "mamba_num_heads": "SSM group",
          "num_moe_experts": "routing group"}  # fmt: skip
LOW_ROWS = 24
"""More units than this stand in low rows."""
STEPS = (0.6, 0.85, 1.15, 1.6)
"""Borders of the shades: score over the mean of the layer."""


def every_unit(run: Run, hparam: str, axes: list[Axis]) -> Html:
    """A cell a unit: full for a kept one, small for a removed one, darker the more important it is."""
    columns = names(run, axes)
    units, groups = max(axis.units for axis in axes), max(axis.groups for axis in axes)
    _, unit = WORDS[hparam]
    height = units * (16 if units <= 16 else 8 if units <= 64 else max(3, 512 // units))
    rows = Bands([str(n) for n in range(units)])
    plot = Plot(Bands(columns), rows, max(height, 34), "layer", unit, y_down=True)
    _cells(plot, {columns.index(column_name(axis)): axis for axis in axes})
    if 1 < groups < units:
        plot.shape((f"M0 {SIDE * g / groups:.1f}h{SIDE}" for g in range(1, groups)), "line group")
    removed_columns(plot, run)
    scored = all(axis.scores is not None for axis in axes)
    keys = [("kept", f"kept {unit}")]
    keys += [("cut small", f"removed {unit}")] if any(not axis.kept.all() for axis in axes) else []
    keys += [("ramp", "below to above the mean of its layer")] if scored else []
    keys += [("gone", "layer removed")] if run.layers_removed else []
    said = observed(run, hparam) if scored else f"Which {unit}s were kept."
    if 1 < groups < units:
        said += f" The {INSIDE[hparam]}s, set apart, rank their {unit}s by themselves."
    if hparam == "num_moe_experts" and (silent := _silent(run)):
        said += f" Calibration sent {counted(silent, 'expert')} no token; they rank last."
    alive = [a for a in axes if a.layer not in run.layers_removed] or axes
    alt = (f"{hparam}: {exact(alive[0].kept.sum())} of {exact(alive[0].units)} {unit}s kept in each of "
           f"{counted(len(alive), 'layer')}; the table below names them.")  # fmt: skip
    return figure(title(run, hparam), said, legend(*keys), plot.html(alt), _kept_table(run, hparam, axes))


def _cells(plot: Plot, axes: dict[int, Axis]) -> None:
    """Cells of one look are one path."""
    looks: dict[str, list[str]] = {}
    for place, axis in axes.items():
        for n, (kept, shade) in enumerate(zip(axis.kept, _shades(axis), strict=True)):
            look = f"{'kept' if kept else 'cut'} s{shade}"
            looks.setdefault(look, []).append(_cell(plot, place, n, bool(kept)))
    for look in sorted(looks):
        plot.shape(looks[look], look)


def _cell(plot: Plot, place: int, n: int, kept: bool) -> str:
    assert isinstance(plot.y, Bands)
    units = len(plot.y.names)
    left, right = (0.06, 0.94) if kept else (0.3, 0.7)
    # Rows of few pixels leave a removed unit its height: a thinner mark could not be seen.
    top, bottom = (left, right) if units <= LOW_ROWS else (0.06, 0.94)
    return plot.box(
        plot.side(place + left), (n + top) / units, plot.side(place + right), (n + bottom) / units
    )


def _shades(axis: Axis) -> np.ndarray:
    """[units] shade 0 to 4 of each unit."""
    if axis.scores is None:
        return np.full(axis.units, 3)
    mean = axis.scores.mean()
    return np.searchsorted(STEPS, axis.scores / mean if mean > 0 else np.ones(axis.units))


def _silent(run: Run) -> int:
    return sum(map(len, run.plan.get("calibration", {}).get("experts_without_tokens", {}).values()))


def _kept_table(run: Run, hparam: str, axes: list[Axis]) -> Html:
    rows = []
    for axis in axes:
        kept = ranges(np.flatnonzero(axis.kept).tolist())
        if axis.layer in run.layers_removed:
            kept = "layer removed"
        best = DASH if axis.scores is None else str(int(axis.scores.argmax()))
        rows.append([column_name(axis), kept, best])
    return numbers("The kept units of every layer",
                   table(["layer", "kept", "most important"], rows, left=2,
                         caption=f"{hparam}: kept units by layer"))  # fmt: skip
