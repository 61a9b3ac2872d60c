"""The candidates of a search: what they weigh, what they were thought and found to cost, who won."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mbridge_prune.report.charts.naming import log_scale
from mbridge_prune.report.markup import Html, code, join, numbers, table, tag
from mbridge_prune.report.numbers import DASH, GAP, counted, exact, short, significant, with_error
from mbridge_prune.report.plot import SIDE, Linear, Plot, figure, legend, spread
from mbridge_prune.report.search_record import Candidate, Search

TOP = 20
FACTS = {"active_params": "active", "memory_mb": "MiB"}
UNITS = {
    "params": "parameters",
    "active_params": "parameters active on a token",
    "memory_mb": "MiB of memory",
    "flops": "operations a token",
}


def funnel(search: Search) -> Html:
    """How many candidates every stage saw."""
    steps: list[tuple[int, str]] = []
    if isinstance(search.head.get("grid"), int):
        steps.append((search.head["grid"], "in the space"))
    if isinstance(search.head.get("in_budget"), int):
        bounds = " and ".join(
            f"{_bound(name, limit)}" for name, limit in search.head.get("budgets", {}).items()
        )
        steps.append((search.head["in_budget"], f"inside {bounds}" if bounds else "inside the budget"))
    for seen, samples in search.rounds.values():
        steps.append((seen, f"measured on {counted(samples, 'sample')}" if samples else "measured"))
    if search.scored:
        steps.append((len(search.scored), f"scored by {search.score_name}"))
    if search.winner:
        steps.append((1, "winner"))
    items = (tag("li", tag("b", exact(n)), tag("span", words)) for n, words in steps)
    return tag("ol", *items, class_="funnel")


def _bound(name: str, limit: float) -> str:
    if name == "memory_mb":
        return f"{exact(limit)} MiB of memory"
    return f"{short(limit)} {UNITS.get(name, name)}"


def cloud(search: Search) -> Html | None:
    """Parameters against KL: all candidates, and beside them the measured ones, close up."""
    measured = [
        Point(c.params, c.kl, c.se or 0.0, c)
        for c in search.halving
        if c.params is not None and c.kl is not None
    ]
    points = search.cloud + [
        (c.params, c.predicted) for c in search.halving if c.params is not None and c.predicted is not None
    ]
    if not points and not measured:
        return None
    bound = search.head.get("budgets", {}).get("params")
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

    def all(self) -> Html:
        xs, ys = self._reach(self.points)
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
        xs, ys = self._reach([])
        ys += [p.y + sign * p.se for p in self.measured for sign in (-1, 1)]
        ys += [y for x, y in self.points if min(xs) <= x <= max(xs) and y <= max(ys)]
        plot = self._plot(xs, ys, "the measured ones, close up")
        plot.lines(((p.x, p.y - p.se, p.x, p.y + p.se) for p in self.measured if p.se), "whisker")
        for p in self.measured:
            plot.dots([(p.x, p.y)], "kept-dot", words(self.search, p.of))
        for p in self.ringed:
            if p.of is not self.search.winner:
                plot.mark(p.x, p.y, "ring")
        self._winner(plot)
        return plot.html(f"The measured candidates by parameters and KL, from {significant(min(ys))} to "
                         f"{significant(max(ys))}; the table below lists the best.")  # fmt: skip

    def _reach(self, points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
        """Parameters and KL of these points, of what was measured, and the bound."""
        xs = [x for x, _ in points] + [p.x for p in self.measured]
        return xs + ([self.bound] if self.bound else []), [y for _, y in points] + [
            p.y for p in self.measured
        ]

    def _plot(self, xs: list[float], ys: list[float], what: str) -> Plot:
        y = spread(ys)
        plot = Plot(_wide(xs), y, 340, "parameters", f"KL{log_scale(y)}: {what}")
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
    x = _wide([c.params for c in scored if c.params is not None])
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


def _wide(xs: list[float]) -> Linear:
    low, high = min(xs), max(xs)
    air = (high - low) * 0.05 or high * 0.05 or 1
    return Linear(low - air, high + air, 4, big=True)


def words(search: Search, c: Candidate) -> str:
    cut = ", ".join(f"{h} {n:,}" for h, n in search.cut(c).items())
    parts = [cut or "the full model"]
    if c.params is not None:
        parts.append(f"{short(c.params)} parameters")
    if c.predicted is not None:
        parts.append(f"predicted {significant(c.predicted)}")
    if c.kl is not None:
        parts.append(f"measured {with_error(c.kl, c.se)}")
    parts += [f"{name} {with_error(value, None)}" for name, value in c.scores.items()]
    return "; ".join(parts)


def top(search: Search) -> Html | None:
    """The best candidates, best first."""
    best = search.scored or sorted((c for c in search.halving if c.kl is not None), key=lambda c: c.kl or 0)
    best = best[:TOP]
    if not best:
        return None
    varying = [h for h in best[0].sizes if len({c.sizes.get(h) for c in best}) > 1]
    same = {h: n for h, n in best[0].sizes.items() if h not in varying}
    facts = [f for f in ("active_params", "memory_mb") if any(_tells(c, f) for c in best)]
    names = list(dict.fromkeys(name for c in best for name in c.scores if name != "kl" or c.kl is None))
    head = ["", *map(code, names), "parameters", *(FACTS[f] for f in facts), *map(code, varying),
            "KL predicted", "KL measured"]  # fmt: skip
    rows = []
    for place, c in enumerate(best, 1):
        rows.append([
            tag("b", f"{place}{GAP}winner", class_="win") if c is search.winner else str(place),
            *(DASH if n not in c.scores else with_error(c.scores[n], None) for n in names),
            DASH if c.params is None else short(c.params), *(_fact(f, c.facts.get(f)) for f in facts),
            *(exact(c.sizes[h]) for h in varying),
            DASH if c.predicted is None else f"{c.predicted:.3f}",
            DASH if c.kl is None else with_error(c.kl, c.se),
        ])  # fmt: skip
    kept = ", ".join(f"{h} {n:,}" for h, n in same.items())
    said = f"Best first. All of them have {kept}." if kept else "Best first."
    return figure("The best candidates", said, table(head, rows, caption="The best candidates, best first"))


def _tells(c: Candidate, fact: str) -> bool:
    """Active parameters that are all parameters say nothing new."""
    return fact in c.facts and not (fact == "active_params" and c.facts[fact] == c.params)


def _fact(name: str, value: float | None) -> str:
    if value is None:
        return DASH
    return exact(value) if name == "memory_mb" else short(value)


def space(search: Search) -> Html | None:
    """The choices of every hparam, folded away."""
    choices = search.head.get("space") or {}
    if not choices:
        return None
    rows = [[code(h), len(sizes), ", ".join(exact(n) for n in sizes)] for h, sizes in choices.items()]
    head, what = ["", "choices", "sizes"], "The search space"
    return numbers(what, table(head, rows, left=1, caption=what, class_="wrap"))
