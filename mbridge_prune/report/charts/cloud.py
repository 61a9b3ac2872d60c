"""The candidates of a search: what they weigh, what they were thought and found to cost, who won."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mbridge_prune.report.charts.candidates import words
from mbridge_prune.report.charts.naming import log_scale
from mbridge_prune.report.markup import Html, code, join, tag
from mbridge_prune.report.numbers import counted, short, significant
from mbridge_prune.report.plot import SIDE, Linear, Plot, figure, legend, sizes, spread
from mbridge_prune.report.search_record import Candidate, Search


def cloud(search: Search) -> Html | None:
    """Parameters against KL: all candidates, and beside them the measured ones, close up."""
    measured = [
        Point(c.params, c.kl, c.se or 0.0, c)
        for c in search.measured
        if c.params is not None and c.kl is not None
    ]
    points = search.cloud + [
        (c.params, c.predicted) for c in search.measured if c.params is not None and c.predicted is not None
    ]
    if not points and not measured:
        return None
    bound = search.budgets.get("params")
    everything = _Cloud(search, points, measured, bound)
    panels = [everything.all()]
    if measured and points:
        panels.append(everything.close_up())
    keys = [("dot cloud", "predicted"), ("front", "front of the predictions")] if points else []
    keys += [("dot kept", "measured, ± one standard error")] if measured else []
    keys += [("ring", f"scored by {search.score_name}")] if everything.ringed and len(panels) > 1 else []
    keys += [("bound", f"budget: {short(bound)}")] if bound else []
    keys += [("diamond", "winner")] if search.winner else []
    said = (
        "KL divergence of each candidate to the full model, in nats a token, lower is better: as the "
        "surrogate predicts it, and as it was measured for those that looked best."
    )
    return figure("The candidates", said, legend(*keys), tag("div", *panels, class_="pair"))


class Point(NamedTuple):
    """A measured candidate."""

    x: float
    y: float
    se: float
    of: Candidate


@dataclass
class _Cloud:
    """What both panels draw."""

    search: Search
    points: list[tuple[float, float]]
    measured: list[Point]
    bound: float | None

    @property
    def ringed(self) -> list[Point]:
        chosen = {id(c) for c in self.search.scored}
        return [point for point in self.measured if id(point.of) in chosen]

    @property
    def promising(self) -> list[Point]:
        """What the halving and the score function saw; everything measured where neither ran."""
        seen = {c.key for c in [*self.search.halving, *self.search.scored]}
        return [point for point in self.measured if point.of.key in seen] or self.measured

    def all(self) -> Html:
        xs, ys = self._reach(self.points, self.measured)
        plot = self._plot(xs, ys, "all candidates")
        plot.dots(((p.x, p.y) for p in self.measured), "kept-dot")
        self._winner(plot)
        winner = self.search.winner
        alt = (
            f"All candidates by parameters and KL: {counted(len(self.search.cloud), 'prediction')}, "
            f"{counted(len(self.measured), 'measurement')}."
        )
        if winner and winner.params:
            alt += f" The winner has {short(winner.params)} parameters."
        return plot.html(alt)

    def close_up(self) -> Html:
        near = self.promising
        xs, ys = self._reach([], near)
        ys += [p.y + sign * p.se for p in near for sign in (-1, 1)]
        ys += [y for x, y in self.points if min(xs) <= x <= max(xs) and y <= max(ys)]
        plot = self._plot(xs, ys, "the promising ones, close up")
        plot.lines(((p.x, p.y - p.se, p.x, p.y + p.se) for p in near if p.se), "whisker")
        for p in near:
            plot.dots([(p.x, p.y)], "kept-dot", words(self.search, p.of))
        for p in self.ringed:
            if p.of is not self.search.winner:
                plot.mark(p.x, p.y, "ring")
        self._winner(plot)
        return plot.html(f"The promising candidates by parameters and KL, from {significant(min(ys))} to "
                         f"{significant(max(ys))}; the table below lists the best.")  # fmt: skip

    def _reach(
        self, points: list[tuple[float, float]], measured: list[Point]
    ) -> tuple[list[float], list[float]]:
        """Parameters and KL of predictions and measurements, and the bound."""
        xs = [x for x, _ in points] + [p.x for p in measured]
        return xs + ([self.bound] if self.bound else []), [y for _, y in points] + [p.y for p in measured]

    def _plot(self, xs: list[float], ys: list[float], what: str) -> Plot:
        y = spread(ys)
        plot = Plot(sizes(xs), y, 340, "parameters", f"KL{log_scale(y)}: {what}")
        inside = [(a, b) for a, b in self.points if 0 <= plot.x.at(a) <= 1 and 0 <= plot.y.at(b) <= 1]
        plot.dots(inside, "cloud")
        if len(inside) > 1:
            plot.line(front(inside), "front")
        if self.bound:
            plot.shape([f"M{SIDE * plot.fx(self.bound):.1f} 0v{SIDE}"], "line bound")
        return plot

    def _winner(self, plot: Plot) -> None:
        winner = self.search.winner
        y = None if winner is None else winner.kl if winner.kl is not None else winner.predicted
        if winner and winner.params is not None and y is not None:
            mark_winner(plot, self.search, winner, y)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front as steps: the lowest value at no more parameters."""
    steps: list[tuple[float, float]] = []
    ordered = sorted(points)
    for x, y in ordered:
        if not steps:
            steps.append((x, y))
        elif y < steps[-1][1]:
            steps += [(x, steps[-1][1]), (x, y)]
    if ordered and steps:
        steps.append((ordered[-1][0], steps[-1][1]))
    return steps


def scores(search: Search) -> Html | None:
    """Parameters against the user's score, where that is not the KL of the plot above."""
    name = search.score_name
    scored = [c for c in search.scored if c.params is not None]
    if not scored or name == "kl":
        return None
    values = [c.scores[name] for c in scored]
    low, high = min(values), max(values)
    air = (high - low) * 0.12 or abs(high) * 0.1 or 1
    x = sizes([c.params for c in scored if c.params is not None])
    plot = Plot(x, Linear(low - air, high + air, 4), 320, "parameters", name)
    for c in scored:
        if c is not search.winner:
            plot.dots([(c.params or 0, c.scores[name])], "kept-dot", words(search, c))
    if search.winner in scored:
        mark_winner(plot, search, search.winner, search.winner.scores[name])
    better = "lower" if search.lower_is_better else "higher"
    alt = f"{name} of {counted(len(scored), 'candidate')}, from {significant(low)} to {significant(high)}."
    said = f"What the score function says of the last {len(scored)}; {better} is better."
    keys = legend(("dot kept", "candidate"), ("diamond", "winner"))
    return figure(join(["Score ", code(name)]), said, keys, plot.html(alt))


def mark_winner(plot: Plot, search: Search, winner: Candidate, y: float) -> None:
    plot.mark(winner.params or 0, y, "diamond", words(search, winner))
    plot.label(winner.params or 0, y, "winner", "strong down" if plot.fy(y) < 0.15 else "strong")
