"""Where the time of the run went."""

from __future__ import annotations

from mbridge_prune.report.data import Run
from mbridge_prune.report.markup import Html, join, numbers, table, tag
from mbridge_prune.report.numbers import duration, share


def times(run: Run) -> Html:
    """Steps with their share of the run."""
    seconds = run.plan.get("seconds") or {}
    total = sum(seconds.values())
    rows = []
    for name, value in seconds.items():
        bar = tag("i", style=f"width:{100 * value / (total or 1):.1f}%")
        rows.append([name, duration(value), share(value, total), tag("span", bar, class_="bar time",
                                                                     aria_hidden="true")])  # fmt: skip
    if len(rows) > 1:
        rows.append([tag("b", "together"), tag("b", duration(total)), "", ""])
    logged = [[name, what, duration(value)] for name, what, value in run.log.steps]
    parts = [
        table(["step", "time", "share", ""], rows, caption="Time of each step") if rows else None,
        numbers("What the log timed", table(["", "", "time"], logged, left=2, caption="Logged steps"))
        if logged else None,
    ]  # fmt: skip
    if not rows and not logged:
        parts.append(tag("p", "The run recorded no times.", class_="note"))
    return join(parts)
