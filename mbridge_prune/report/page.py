"""report.html: one page, made from the files of a run folder alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.files import replaced
from mbridge_prune.report.charts import candidates, cloud, surrogate
from mbridge_prune.report.charts.importance import importance
from mbridge_prune.report.charts.layers import layers
from mbridge_prune.report.charts.repairs import repairs
from mbridge_prune.report.charts.times import times
from mbridge_prune.report.data import Run, read_run
from mbridge_prune.report.headline import cost, headline, sizes
from mbridge_prune.report.markup import Html, code, join, table, tag
from mbridge_prune.report.numbers import DASH, ranges
from mbridge_prune.report.search_record import Search
from mbridge_prune.report.style import CSS

REPORT = "report.html"
FEW_LAYERS = 12


def write_report(run_folder: str | Path) -> Path:
    """Writes report.html into a run folder, on rank 0, aside first; returns its path.

    Raises:
        UserError: a file that every finished run has is missing or broken.
    """
    path = Path(run_folder) / REPORT
    if runtime.rank() == 0:
        write(path, page(read_run(run_folder)))
    return path


def page(run: Run) -> str:
    """The whole page."""
    sections = [
        *([section("cut", "What was cut, and what it cost", None, *_cut(run))] if run.cut else []),
        *([_search(run.search)] if run.search else []),
        section("importance", f"Importance{' and kept units' if run.cut else ''}", _about_importance(run),
                _importance(run)),
        section("time", "Time", None, times(run)),
        section("settings", "Settings and versions", None, settings(run)),
    ]  # fmt: skip
    title, foot = f"{run.model}: pruning report", f"Made from the files of {run.name}/."
    return document(title, headline(run), sections, foot)


def _cut(run: Run) -> tuple[Html | None, ...]:
    return sizes(run), cost(run), repairs(run)


def _search(search: Search) -> tuple[str, str, Html]:
    said = (
        "Candidates inside the budget are ranked by a surrogate, the best of them measured on more and more "
        "text, the last scored."
    )
    broken = f"Left out of candidates.jsonl: line {ranges(search.broken)}, cut short when a run was killed."
    return section(
        "search", "The search", said, candidates.funnel(search), cloud.cloud(search), candidates.top(search),
        *_surrogate(search), candidates.space(search),
        tag("p", broken, class_="note") if search.broken else None,
    )  # fmt: skip


def _surrogate(search: Search) -> Iterator[Html | None]:
    """Its agreement stands beside the plot of the scores; beside its curves where that plot says no more."""
    scores, agreement, curves = cloud.scores(search), surrogate.agreement(search), surrogate.curves(search)
    yield tag("div", *([scores, agreement] if scores else [agreement, curves]), class_="pair")
    if scores:
        yield curves


def _about_importance(run: Run) -> str:
    if run.no_scores:
        return run.no_scores
    tokens = run.plan.get("calibration", {}).get("tokens")
    data = run.settings.get("calibration", {}).get("data")
    where = f" of {Path(str(data)).name}" if data else ""
    said = f"Measured on {tokens:,} tokens{where}. " if tokens else ""
    return said + "Scores compare units of one axis; their scale differs from layer to layer."


def _importance(run: Run) -> Html:
    """Narrow plots stand in pairs."""
    return tag("div", layers(run), *importance(run), class_="pair" if run.layers <= FEW_LAYERS else None)


def settings(run: Run) -> Html:
    """Every setting of the run, and what it ran with."""
    facts = {
        "host": run.log.where,
        "fingerprint of the model": run.plan.get("fingerprint"),
        "fingerprint of the calibration data": run.plan.get("calibration", {}).get("data"),
    }
    made_with = {**{k: v for k, v in facts.items() if v}, **run.plan.get("versions", {})}
    tables = [
        table([part, ""], [[code(key), say(value)] for key, value in values.items()], left=2,
              caption=f"Settings: {part}")
        for part, values in _parts(run.settings).items()
    ]  # fmt: skip
    if made_with:
        tables.append(table(["made with", ""], list(made_with.items()), left=2,
                            caption="Host, fingerprints and versions"))  # fmt: skip
    return tag("div", *tables, class_="settings")


def _parts(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Section -> its settings; what stands outside a section comes last."""
    parts = {name: values for name, values in settings.items() if isinstance(values, Mapping)}
    loose = {name: value for name, value in settings.items() if not isinstance(value, Mapping)}
    return {**parts, **({"further settings": loose} if loose else {})}


def say(value: Any) -> str:
    """A setting as a person would write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {say(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(say, value)) or "none"
    if value is None:
        return DASH
    return str(value).lower() if isinstance(value, bool) else str(value)


def section(name: str, title: str, said: object, *parts: Html | None) -> tuple[str, str, Html]:
    """(anchor, title, markup)"""
    said = tag("p", said) if said else None
    return name, title, tag("section", tag("h2", title), said, join(parts), id=name)


def document(title: str, head: Html, sections: Iterable[tuple[str, str, Html]], foot: str) -> str:
    """The frame that every page has; nothing in it is loaded from anywhere."""
    sections = list(sections)
    links = (tag("li", tag("a", name, href=f"#{anchor}")) for anchor, name, _ in sections)
    return "<!doctype html>\n" + tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("style", Html(CSS)),
        ),
        tag(
            "body", head, tag("nav", tag("ul", *links), aria_label="Sections"),
            tag("main", *(markup for _, _, markup in sections)),
            tag("footer", tag("p", f"{foot} mbridge_prune")),
        ),
        lang="en",
    ) + "\n"  # fmt: skip


def write(path: Path, content: str) -> None:
    """Aside, then renamed.

    Raises:
        UserError: the file cannot be written.
    """
    with replaced(path) as aside:
        aside.write_text(content, encoding="utf-8")
