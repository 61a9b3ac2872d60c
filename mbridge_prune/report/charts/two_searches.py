"""What two searches measured, in one plot."""

from __future__ import annotations

from mbridge_prune.report.charts.naming import log_scale
from mbridge_prune.report.markup import Html
from mbridge_prune.report.numbers import counted
from mbridge_prune.report.plot import Linear, Plot, figure, legend, spread
from mbridge_prune.report.search_record import Search


def two_searches(searches: list[Search | None], titles: tuple[str, str]) -> Html | None:
    """Parameters against measured KL of both; None unless both measured candidates."""
    measured = [(search.halving or search.measured) if search else [] for search in searches]
    points = [
        [(c.params, c.kl) for c in group if c.params is not None and c.kl is not None] for group in measured
    ]
    if not all(points):
        return None
    xs, ys = ([point[i] for group in points for point in group] for i in (0, 1))
    air = (max(xs) - min(xs)) * 0.06 or max(xs) * 0.05
    y = spread(ys)
    plot = Plot(Linear(min(xs) - air, max(xs) + air, 5, big=True), y, 320, "parameters", f"KL{log_scale(y)}")
    for group, class_ in zip(points, ("kept-dot", "b-dot"), strict=True):
        plot.dots(group, class_)
    for search, letter in zip(searches, "AB", strict=True):
        winner = search.winner if search else None
        if winner and winner.params is not None and winner.kl is not None:
            plot.mark(winner.params, winner.kl, "diamond", f"winner of {letter}")
            plot.label(winner.params, winner.kl, letter, "strong")
    keys = legend(("dot kept", titles[0]), ("square", titles[1]), ("diamond", "winner"))
    said = "KL to the full model, nats a token, of the candidates that each search measured on the most text."
    counts = " and ".join(counted(len(group), "candidate") for group in points)
    return figure("Measured candidates", said, keys, plot.html(f"Measured KL by parameters of {counts}."))
