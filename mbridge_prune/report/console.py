"""What rank 0 shows on the terminal: the log, progress bars, the before/after table."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from mbridge_prune import runtime

log = logging.getLogger("mbridge_prune")


def console(aside: bool = False) -> Console:
    """Where rank 0 speaks; silent on other ranks. Aside is stderr, where stdout is the result alone."""
    return Console(stderr=aside, quiet=runtime.rank() != 0, soft_wrap=True)


@contextmanager
def progress_bar(what: str, total: int, unit: str, aside: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields step(n). A live bar with rate and time left on a terminal; log lines elsewhere.

    Args:
        aside: on stderr, and without a line in the log: stdout is the result alone.
    """
    say = _aside if aside else log.info
    begin = time.monotonic()
    if runtime.rank() != 0:
        yield lambda n: None
        return
    if not (sys.stderr if aside else sys.stdout).isatty():
        yield _logged(what, total, unit, say)
    else:
        columns: list[Any] = [
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
        ]  # fmt: skip
        with Progress(*columns, console=console(aside), transient=True) as bar:
            task = bar.add_task(what, total=total, rate="")

            def step(n: int) -> None:
                done = bar.tasks[task].completed + n
                bar.update(task, advance=n, rate=f"{done / (time.monotonic() - begin):.2f}/s")

            yield step
    seconds = time.monotonic() - begin
    say("%s: %d %s in %.1f s (%.2f/s)", what, total, unit, seconds, total / max(seconds, 1e-9))


def _aside(text: str, *values: object) -> None:
    print(text % values, file=sys.stderr, flush=True)


def _logged(
    what: str, total: int, unit: str, say: Callable[..., None], every: float = 15.0
) -> Callable[[int], None]:
    state = {"done": 0, "said": time.monotonic(), "begin": time.monotonic()}

    def step(n: int) -> None:
        state["done"] += n
        now = time.monotonic()
        if now - state["said"] > every and state["done"] < total:
            rate = state["done"] / (now - state["begin"])
            left = (total - state["done"]) / rate
            say("%s: %d of %d %s, %.2f/s, %.0f s left", what, state["done"], total, unit, rate, left)
            state["said"] = now

    return step


def before_after(plan: Any, extra: list[tuple[str, str, str]] | None = None) -> Table:
    """The table of every size before and after, parameters last, `extra` rows below."""
    table = Table(title="before and after")
    for column in ("", "before", "after", "kept"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for hparam, before in plan.sizes_before.items():
        after = plan.sizes_after[hparam]
        style = None if after == before else "bold"
        table.add_row(hparam, f"{before:,}", f"{after:,}", f"{after / before:.0%}", style=style)
    kept = plan.params_after / plan.params_before
    table.add_row("parameters", f"{plan.params_before:,}", f"{plan.params_after:,}", f"{kept:.1%}",
                  style="bold")  # fmt: skip
    if plan.active_before not in (0, plan.params_before):
        table.add_row("active parameters", f"{plan.active_before:,}", f"{plan.active_after:,}",
                      f"{plan.active_after / plan.active_before:.1%}")  # fmt: skip
    for name, before_text, after_text in extra or []:
        table.add_row(name, before_text, after_text, "")
    return table


def space_table(choices: Mapping[str, Sequence[int]], limits: Mapping[str, float]) -> Table:
    """What a search may choose from, and the bounds it has to keep."""
    bounds = ", ".join(
        f"{name} at most {limit:,.0f}" if limit >= 100 else f"{name} at most {limit:.4g}"
        for name, limit in limits.items()
    )
    table = Table(title=f"search space: {math.prod(map(len, choices.values())):,} combinations; {bounds}")
    for column in ("", "sizes", "how many"):
        table.add_column(column, justify="right" if column == "how many" else "left", overflow="fold")
    for hparam, sizes in choices.items():
        table.add_row(hparam, ", ".join(map(str, sizes)), str(len(sizes)))
    return table
