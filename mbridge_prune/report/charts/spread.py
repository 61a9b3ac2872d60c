"""How importance is spread over the channels of every layer, and where the cut fell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbridge_prune.report.charts.naming import column_name, log_scale, names, observed, removed_columns, title
from mbridge_prune.report.data import Axis, Run
from mbridge_prune.report.markup import Html, numbers, table
from mbridge_prune.report.numbers import DASH, counted, exact, share, significant
from mbridge_prune.report.plot import SIDE, Bands, Plot, figure, legend, spread


@dataclass(frozen=True)
class Column:
    """One layer of an hparam's plot, in numbers."""

    name: str
    axis: Axis
    low: float
    p5: float
    p25: float
    median: float
    p75: float
    p95: float
    high: float
    cut: float | None
    """Below this score units were removed (the middle over groups that rank by themselves)."""
    share: float
    """Of the layer's summed importance, what the kept units hold."""


def spread_by_layer(run: Run, hparam: str, axes: list[Axis]) -> Html:
    """Quantile bars, one a layer, in two colours: what lies above the cut, what below."""
    found = columns(run, axes)
    y = spread(v for c in found.values() for v in (c.p5, c.p95))
    plot = Plot(Bands(names(run, axes)), y, 210, "layer", "importance" + log_scale(y))
    _bars(plot, found)
    for place, c in found.items():
        plot.column(place, "hover", _words(c))
    removed_columns(plot, run)
    cut = any(c.cut is not None for c in found.values())
    bars = "middle half (wide) and 90 % (narrow) of the units"
    keys = [("kept", f"kept: {bars}" if cut else bars), ("median", "median")]
    keys += [("cut", "removed"), ("border", "the cut")] if cut else []
    keys += [("gone", "layer removed")] if run.layers_removed else []
    said = observed(run, hparam)
    alive = [c.share for c in found.values() if c.axis.layer not in run.layers_removed]
    if cut and alive:
        said += f" What was kept holds {_range(alive)} of a layer\u2019s summed importance."
    return figure(title(run, hparam), said, legend(*keys), plot.html(_alt(hparam, found)),
                  _table(hparam, found))  # fmt: skip


def _bars(plot: Plot, found: dict[int, Column]) -> None:
    for class_, half, low, high in (("wide", 0.13, "p5", "p95"), ("half", 0.3, "p25", "p75")):
        kept, gone = [], []
        for place, c in found.items():
            a, b = getattr(c, low), getattr(c, high)
            border = min(max(c.cut, a), b) if c.cut is not None else a
            kept.append(_bar(plot, place, half, border, b))
            gone.append(_bar(plot, place, half, a, border) if border > a else "")
        plot.shape(kept, f"kept {class_}")
        plot.shape(gone, f"cut {class_}")
    plot.shape((_level(plot, p, 0.3, c.median) for p, c in found.items()), "line median")
    plot.shape((_level(plot, p, 0.5, c.cut) for p, c in found.items() if c.cut is not None), "line border")


def _words(c: Column) -> str:
    said = f"layer {c.name}: median {significant(c.median)}, 90 % of the units from {significant(c.p5)} to "
    said += significant(c.p95)
    if c.cut is not None:
        said += f"; kept {exact(c.axis.kept.sum())} of {exact(c.axis.units)}, "
        said += f"{share(c.share, 1)} of the importance"
    return said


def _bar(plot: Plot, place: int, half: float, low: float, high: float) -> str:
    return plot.box(plot.side(place + 0.5 - half), plot.fy(high), plot.side(place + 0.5 + half), plot.fy(low))


def _level(plot: Plot, place: int, half: float, value: float) -> str:
    left, right = SIDE * plot.side(place + 0.5 - half), SIDE * plot.side(place + 0.5 + half)
    return f"M{left:.1f} {SIDE * plot.fy(value):.1f}H{right:.1f}"


def columns(run: Run, axes: Sequence[Axis]) -> dict[int, Column]:
    """Place on the x axis -> numbers of that layer."""
    places = {name: place for place, name in enumerate(names(run, axes))}
    return {places[column_name(axis)]: _column(axis) for axis in axes if axis.scores is not None}


def _column(axis: Axis) -> Column:
    scores = axis.scores
    assert scores is not None
    low, p5, p25, median, p75, p95, high = np.quantile(scores, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
    total = scores.sum()
    part = scores[axis.kept].sum() / total if total else 1.0
    return Column(column_name(axis), axis, low, p5, p25, median, p75, p95, high, _cut(axis), float(part))


def _cut(axis: Axis) -> float | None:
    """Midway between the last unit kept and the first removed; the median over groups."""
    assert axis.scores is not None
    borders = []
    for scores, kept in zip(axis.scores.reshape(axis.groups, -1), axis.kept.reshape(axis.groups, -1),
                            strict=True):  # fmt: skip
        if kept.any() and not kept.all():
            borders.append((scores[kept].min() + scores[~kept].max()) / 2)
    return float(np.median(borders)) if borders else None


def _table(hparam: str, found: dict[int, Column]) -> Html:
    rows = [
        [c.name, exact(c.axis.kept.sum()), exact(c.axis.units), significant(c.p5), significant(c.median),
         significant(c.p95), DASH if c.cut is None else significant(c.cut), share(c.share, 1)]
        for c in found.values()
    ]  # fmt: skip
    head = ["layer", "kept", "of", "5 %", "median", "95 %", "cut at", "importance kept"]
    return numbers("The numbers of every layer",
                   table(head, rows, caption=f"{hparam}: importance by layer"))  # fmt: skip


def _range(shares: list[float]) -> str:
    low, high = min(shares), max(shares)
    return share(low, 1) if share(low, 1) == share(high, 1) else f"{100 * low:.1f} to {share(high, 1)}"


def _alt(hparam: str, found: dict[int, Column]) -> str:
    if not found:
        return f"{hparam}: no scores"
    top = max(found.values(), key=lambda c: c.median)
    low = min(found.values(), key=lambda c: c.median)
    return (
        f"{hparam}: spread of importance in {counted(len(found), 'layer')}; the median is highest in layer "
        f"{top.name} ({significant(top.median)}) and lowest in layer {low.name} ({significant(low.median)})."
    )
