"""Where the time of the run went."""

from __future__ import annotations

from mbridge_prune.report.data import Run
from mbridge_prune.report.markup import Html, join, numbers, table, tag
from mbridge_prune.report.numbers import duration, share


def times(run: Run) -> Html:
    """Steps with their share of the run."""
    seconds = run.plan.get("seconds") or {}
    total = sum(seconds.values())
    rows: list[list[object]] = [[name, *_share_of(value, total)] for name, value in seconds.items()]
    if len(rows) > 1:
        rows.append([tag("b", "together"), tag("b", duration(total)), "", ""])
    logged: list[list[object]] = [[name, what, duration(value)] for name, what, value in run.log.steps]
    parts = [table(["step", "time", "share", ""], rows, caption="Time of each step") if rows else None]
    if run.search and logged:  # nearly all of it is one step of the table above
        whole = sum(value for *_, value in run.log.steps)
        logged = [[name, what, *_share_of(value, whole)] for name, what, value in run.log.steps]
        parts.append(table(["of these", "", "time", "share", ""], logged, left=2, caption="Logged steps"))
    elif logged:
        steps = table(["", "", "time"], logged, left=2, caption="Logged steps")
        parts.append(numbers("What the log timed", steps))
    if not rows and not logged:
        parts.append(tag("p", "The run recorded no times.", class_="note"))
    return join(parts)


def _share_of(value: float, total: float) -> tuple[str, str, Html]:
    """A time, its share of the total, and a bar of that length."""
    bar = tag("i", style=f"width:{100 * value / (total or 1):.1f}%")
    return duration(value), share(value, total), tag("span", bar, class_="bar time", aria_hidden="true")
