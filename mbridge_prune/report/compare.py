"""Two runs side by side in one page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.dynamic import DEPTH
from mbridge_prune.report.charts.naming import column_name, log_scale, names
from mbridge_prune.report.charts.two_searches import two_searches
from mbridge_prune.report.data import Run, read_run
from mbridge_prune.report.headline import measured
from mbridge_prune.report.markup import Html, code, join, table, tag
from mbridge_prune.report.numbers import DASH, GAP, counted, duration, exact, ranges, rounded, share, short
from mbridge_prune.report.numbers import with_error as with_se
from mbridge_prune.report.overlap import Overlap, middle_rank, overlaps
from mbridge_prune.report.page import document, say, section, write
from mbridge_prune.report.plot import SIDE, Bands, Linear, Plot, figure, legend, spread


def write_comparison(a: str | Path, b: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of two run folders, on rank 0; by default `compare-with-<B>.html` in folder A.

    Raises:
        UserError: a folder is no finished run, or the file cannot be written.
    """
    first, second = read_run(a), read_run(b)
    path = Path(output) if output else Path(a) / f"compare-with-{second.name}.html"
    if runtime.rank() == 0:
        write(path, comparison(first, second))
    return path


def comparison(a: Run, b: Run) -> str:
    """The whole page."""
    names = _titles(a, b)
    titles = f"A: {names[0]}", f"B: {names[1]}"
    one_model = _one_model(a, b)
    candidates = two_searches([a.search, b.search], titles)
    sections = [section("results", "Sizes and cost", None, results(a, b, titles), candidates)]
    if one_model:
        sections.append(section("layers", "Layers", None, layers(a, b, titles)))
        sections.append(_agreement(a, b))
    sections.append(section("settings", "What was set differently", None, differences(a, b, titles)))
    if one_model:
        said = f"Both were cut from {a.model}."
    else:
        said = f"They were cut from different models, {a.model} and {b.model}: their units are not compared."
    head = tag(
        "header",
        tag("p", "two pruning runs", class_="over"),
        tag("h1", " and ".join(names)),
        tag("p", said, class_="lead"),
    )
    return document(
        " and ".join(names), head, sections, f"Made from the files of {names[0]}/ and {names[1]}/."
    )


def _titles(a: Run, b: Run) -> tuple[str, str]:
    """Folder names; with their parents where they are the same."""
    if a.name != b.name:
        return a.name, b.name
    return "/".join(a.folder.parts[-2:]), "/".join(b.folder.parts[-2:])


def _one_model(a: Run, b: Run) -> bool:
    prints = a.plan.get("fingerprint"), b.plan.get("fingerprint")
    return a.before == b.before and (None in prints or prints[0] == prints[1])


def results(a: Run, b: Run, titles: tuple[str, str]) -> Html:
    """Every size and every measurement of both."""
    rows: list[list[object]] = []
    for hparam in dict.fromkeys([*a.before, *b.before]):
        rows.append([code(hparam), *(_size(run, hparam) for run in (a, b))])
    rows.append([tag("b", "parameters"), *(_params(run, "params") for run in (a, b))])
    if a.experts or b.experts:
        rows.append(["active on a token", *(_params(run, "active") for run in (a, b))])
    for words, which, name, tell in (
        ("loss before, nats a token", "before", "loss", None),
        ("loss after, nats a token", "after", "loss", None),
        ("perplexity after", "after", "loss", lambda loss: f"{math.exp(min(loss, 20)):,.1f}"),
        ("KL to the full model", "kl", "kl", None),
    ):  # fmt: skip
        values = [_measured(run, which, name, tell) for run in (a, b)]
        if any(values):
            rows.append([words, *(value or DASH for value in values)])
    searches = [run.search for run in (a, b)]
    for name in dict.fromkeys(n for s in searches if s and s.winner for n in s.winner.scores):
        scores = [s.winner.scores.get(name) if s and s.winner else None for s in searches]
        rows.append([join(["score of the winner, ", code(name)]),
                     *(DASH if x is None else with_se(x, None) for x in scores)])  # fmt: skip
    times = [sum((run.plan.get("seconds") or {}).values()) for run in (a, b)]
    rows.append(["time", *(duration(t) if t else DASH for t in times)])
    return table(["", *titles], rows, caption="Sizes and cost of both runs")


def _size(run: Run, hparam: str) -> str:
    if hparam not in run.before:
        return DASH
    before, after = run.before[hparam], run.after[hparam]
    return exact(after) if before == after else f"{exact(before)}{GAP}→{GAP}{exact(after)}"


def _params(run: Run, which: str) -> str:
    before, after = run.plan.get(f"{which}_before") or 0, run.plan.get(f"{which}_after") or 0
    return f"{short(after)}{GAP}({share(after, before)})"


def _measured(run: Run, which: str, name: str, tell: Callable[[float], str] | None) -> str | None:
    found = measured(run, which, name)
    if found is None:
        return None
    return tell(found[0]) if tell else with_se(found[0], found[1])


def layers(a: Run, b: Run, titles: tuple[str, str]) -> Html:
    """Which layers each kept, and what each thought of them."""
    plot = Plot(Bands([str(n) for n in range(a.layers)]), Bands("AB"), 56, "layer", y_down=True)
    for row, run in enumerate((a, b)):
        gone = set(run.layers_removed)
        for class_, air, wanted in (("kept", 0.06, False), ("cut", 0.3, True)):
            plot.shape(
                (plot.box(plot.side(n + air), (row + air) / 2, plot.side(n + 1 - air), (row + 1 - air) / 2)
                 for n in range(a.layers) if (n in gone) == wanted), class_,
            )  # fmt: skip
    removed = [set(run.layers_removed) for run in (a, b)]
    said = [f"{title} removed {ranges(gone)}" for title, gone in zip("AB", removed, strict=True) if gone]
    if all(removed):
        said.append(f"both removed {ranges(removed[0] & removed[1]) or 'none of the same'}")
    words = "; ".join(said) + "." if said else "Both kept every layer."
    keys = legend(("kept", "kept"), *([("cut small", "removed")] if any(removed) else []))
    kept = figure(join(["Layers kept ", code(DEPTH)]), words, keys, plot.html(words))
    return join([kept, _layer_scores(a, b, titles)])


def _layer_scores(a: Run, b: Run, titles: tuple[str, str]) -> Html | None:
    scores = [run.plan.get("layer_scores") or [] for run in (a, b)]
    if not all(scores):
        return None
    if scores[0] == scores[1]:
        return tag("p", "Both runs scored the layers alike.", class_="note")
    y = spread([*scores[0], *scores[1]])
    plot = Plot(Bands([str(n) for n in range(a.layers)]), y, 220, "layer", "importance" + log_scale(y))
    for values, class_ in zip(scores, ("kept-dot", "b-dot"), strict=True):
        plot.dots(enumerate(values), class_)
    keys = legend(("dot kept", titles[0]), ("square", titles[1]))
    return figure("Importance of the layers", "As each run scored them.", keys,
                  plot.html(f"Importance of every layer in {titles[0]} and {titles[1]}."))  # fmt: skip


def _agreement(a: Run, b: Run) -> tuple[str, str, Html]:
    said = (
        "Of the units that the run with fewer of them kept in a layer, the share that the other run kept, "
        "too; and how alike both rank the units (Spearman, median over the layers). Dashed: by chance."
    )
    found = overlaps(a, b)
    return section("units", "Kept units", said, agreement(found) if found else None,
                   tag("div", *_by_layer(a, found), class_="many"))  # fmt: skip


def agreement(found: Mapping[str, list[Overlap]]) -> Html:
    rows = []
    for hparam, parts in found.items():
        rank = middle_rank(parts)
        rows.append([code(hparam), *_shared(parts), DASH if rank is None else rounded(rank)])
    head = ["", "in both, mean", "least", "by chance", "rank correlation"]
    return join([table(head, rows, caption="Agreement on kept units"),
                 tag("p", f"{DASH} where one of the runs kept all units.", class_="note")])  # fmt: skip


def _shared(parts: list[Overlap]) -> list[str]:
    if all(o.chance == 1 for o in parts):
        return [DASH] * 3
    worst = min(parts, key=lambda o: o.shared)
    where = f" in layer {column_name(worst.axis)}" if worst.axis.place and worst.shared < 1 else ""
    mean_share, chance = mean(o.shared for o in parts), mean(o.chance for o in parts)
    return [share(mean_share, 1), share(worst.shared, 1) + where, share(chance, 1)]


def _by_layer(run: Run, found: Mapping[str, list[Overlap]]) -> list[Html]:
    """A small plot for each hparam that the runs do not wholly agree on."""
    plots = []
    for hparam, parts in found.items():
        if len(parts) < 2 or all(o.shared == 1 for o in parts):
            continue
        columns = names(run, [o.axis for o in parts])
        plot = Plot(Bands(columns), Linear(0, 1, 2), 110, "layer", "in both")
        for o in parts:
            place = columns.index(column_name(o.axis))
            left, right = plot.side(place + 0.15), plot.side(place + 0.85)
            plot.shape([plot.box(left, plot.fy(o.shared), right, 1)], "kept")
            plot.column(place, "hover", f"layer {column_name(o.axis)}: {share(o.shared, 1)} in both")
        plot.shape([f"M0 {SIDE * plot.fy(mean(o.chance for o in parts)):.1f}h{SIDE}"], "line border")
        low = min(o.shared for o in parts)
        alt = f"{hparam}: share of kept units that both runs kept, by layer; at least {share(low, 1)}."
        plots.append(tag("div", tag("h4", code(hparam)), plot.html(alt), class_="small"))
    return plots


def differences(a: Run, b: Run, titles: tuple[str, str]) -> Html:
    """Settings, data and versions that are not the same."""
    mine, other = _flat(a), _flat(b)
    keys = list(dict.fromkeys([*mine, *other]))
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    keys.sort(key=lambda key: sections.index(key.partition(".")[0]))
    pairs = [(key, mine.get(key, DASH), other.get(key, DASH)) for key in keys]
    rows = [[code(key), x, y] for key, x, y in pairs if x != y]
    same = len(keys) - len(rows)
    said = f"{counted(same, 'other setting')} the same." if rows else "Nothing."
    return join([
        table(["", *titles], rows, left=3, caption="Settings that differ") if rows else None,
        tag("p", said, class_="note"),
    ])  # fmt: skip


def _flat(run: Run) -> dict[str, str]:
    flat: dict[str, str] = {}

    def lay(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                lay(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = say(value)

    lay("", run.settings)
    lay("calibrated on ", {"data": run.plan.get("calibration", {}).get("data")})
    lay("", {"host": run.log.where, "versions": run.plan.get("versions", {})})
    return flat
