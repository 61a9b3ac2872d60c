"""All units of an axis that the whole model has once, in descending order."""

from __future__ import annotations

import numpy as np

from mbridge_prune.report.charts.naming import log_scale, observed, title
from mbridge_prune.report.data import Axis, Run
from mbridge_prune.report.markup import Html, numbers, table
from mbridge_prune.report.numbers import exact, share, significant
from mbridge_prune.report.plot import SIDE, Linear, Plot, figure, from_zero, legend, spread

CURVE_POINTS = 160
"""Of each part, at most."""


def sorted_units(run: Run, hparam: str, axis: Axis) -> Html:
    """The curve of importance, kept and removed parts in their colours, and its quantiles."""
    assert axis.scores is not None
    scores, kept = np.sort(axis.scores)[::-1], int(axis.kept.sum())
    y = spread(scores)
    if isinstance(y, Linear):
        y = from_zero(scores)  # an area says its height
    plot = Plot(Linear(0, axis.units, 5, big=True), y, 210, "rank of the unit", "importance" + log_scale(y))
    _part(plot, scores, 0, kept, "kept")
    _part(plot, scores, kept, axis.units, "cut")
    said, keys = observed(run, hparam), [("kept", f"kept: {exact(kept)}")]
    if kept < axis.units:
        plot.lines([(kept, y.low, kept, y.high)], "border")
        keys.append(("cut", f"removed: {exact(axis.units - kept)}"))
        part = share(axis.scores[axis.kept].sum(), axis.scores.sum())
        said += f" What was kept holds {part} of the summed importance."
    q = np.quantile(scores, [1, 0.95, 0.75, 0.5, 0.25, 0.05, 0])
    names = ("highest", "95 %", "75 %", "median", "25 %", "5 %", "lowest")
    rows = [[name, significant(v)] for name, v in zip(names, q, strict=True)]
    alt = (f"{hparam}: importance of {exact(axis.units)} units in descending order, from "
           f"{significant(q[0])} to {significant(q[-1])}; {exact(kept)} kept.")  # fmt: skip
    quantiles = table(["quantile", "importance"], rows, caption=f"{hparam}: quantiles of importance")
    return figure(title(run, hparam), said, legend(*keys), plot.html(alt), numbers("The numbers", quantiles))


def _part(plot: Plot, scores: np.ndarray, first: int, last: int, class_: str) -> None:
    """The units from rank `first` to `last`: an area under its edge."""
    if first >= last:
        return
    places = np.unique(np.linspace(first, last - 1, min(CURVE_POINTS, last - first)).round().astype(int))
    points = [
        (float(first), scores[first]),
        *((p + 0.5, scores[p]) for p in places),
        (last, scores[last - 1]),
    ]
    d = "L".join(f"{SIDE * plot.fx(a):.1f} {SIDE * plot.fy(b):.1f}" for a, b in points)
    left, right = SIDE * plot.fx(first), SIDE * plot.fx(last)
    plot.shape([f"M{left:.1f} {SIDE}L{d}L{right:.1f} {SIDE}z"], f"{class_} area-fill")
    plot.line(points, f"{class_}-edge")
