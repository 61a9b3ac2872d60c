"""report.html of a run of FastNAS or GradNAS: what every axis lost, and what it got."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.report.charts.times import times
from mbridge_prune.report.data import LOG, PLAN, Run, read_json, short_name
from mbridge_prune.report.headline import fact, sizes
from mbridge_prune.report.markup import Html, code, join, table, tag
from mbridge_prune.report.numbers import GAP, change, exact, share, short, significant
from mbridge_prune.report.page import REPORT, document, section, settings, write
from mbridge_prune.report.run_log import read_log

NAMES = {"fastnas": "FastNAS", "gradnas": "GradNAS"}


def write_report(run_folder: str | Path) -> Path:
    """Writes report.html into a run folder, on rank 0, aside first; returns its path.

    Raises:
        UserError: plan.json is missing or broken.
    """
    folder = Path(run_folder)
    path = folder / REPORT
    if runtime.rank() == 0:
        plan = read_json(folder / PLAN, "a finished run leaves it; is this a run folder?")
        run = Run(folder.resolve(), plan, plan.get("settings", {}), {}, log=read_log(folder / LOG))
        write(path, page(run))
    return path


def page(run: Run) -> str:
    """The whole page."""
    sections = [
        section("cut", "What was cut, and what it costs", None, sizes(run), _costs(run)),
        section("search", "The search", _about(run), _drops(run), _alone(run)),
        section("time", "Time", None, times(run)),
        section("settings", "Settings and versions", None, settings(run)),
    ]
    title, foot = f"{model_of(run)}: pruning report", f"Made from the files of {run.name}/."
    return document(title, _head(run), sections, foot)


def model_of(run: Run) -> str:
    """What the settings call the model."""
    said = run.settings.get("model", {})
    return short_name(str(said.get("factory") or said.get("hf_path") or run.name))


def _head(run: Run) -> Html:
    plan, costs = run.plan, run.plan.get("costs", {})
    bound = next(iter(plan.get("search", {}).get("budgets", {})), "flops")
    first = costs.get(bound) or costs["params"]
    facts = [
        fact(name, short(cost["before"]), short(cost["after"]), change(cost["before"], cost["after"]))
        for name, cost in costs.items()
    ]
    search = plan.get("search", {})
    if "score_after" in search:
        before, after = search["score_before"], search["score_after"]
        facts.append(
            fact(search.get("score", "score"), significant(before), significant(after), "recalibrated")
        )
    over = ["pruning report", run.log.when.partition(" ")[0], run.log.where]
    kept = share(first["after"], first["before"])
    return tag(
        "header",
        tag("p", " · ".join(word for word in over if word), class_="over"),
        tag("h1", f"{model_of(run)}, cut to {kept} of its {bound if bound in costs else 'params'}"),
        tag("p", f"{NAMES[plan['mode']]}: every axis has a size of its own. "
            "Not trained since: train it further before use.", class_="lead"),
        tag("dl", *facts, class_="facts", style=f"--n:{len(facts)}"),
    )  # fmt: skip


def _costs(run: Run) -> Html:
    """The profile of the search space, the bounds, and what was found."""
    search = run.plan.get("search", {})
    profiled: Mapping[str, Any] = search.get("profile", {})
    names = list(profiled.get("max", {}))
    rows = [[subnet, *(exact(costs[name]) for name in names)] for subnet, costs in profiled.items()]
    bounds = search.get("budgets", {})
    rows.append([tag("b", "at most"), *(exact(bounds[n]) if n in bounds else "" for n in names)])
    after = {n: c["after"] for n, c in run.plan.get("costs", {}).items()} | search.get("costs", {})
    rows.append([tag("b", "found"), *(exact(after[n]) if n in after else "" for n in names)])
    return table(["subnet", *names], rows, caption="What the subnets of the search space cost")


def _about(run: Run) -> str:
    search = run.plan.get("search", {})
    allowed = search.get("allowed_drop")
    if allowed is None:
        return "Only the smallest size of every axis keeps the budget."
    left = "what the budget then left was given back."
    if run.plan["mode"] == "gradnas":
        batches = run.plan.get("calibration", {}).get("batches")
        return (
            f"Scored by gradients on {batches} batches. Every axis is cut up to the same price, a score of "
            f"{significant(allowed)} for the whole model's cost; {left} The scores that went add up to "
            f"{significant(search['loss_added'])}."
        )
    size = f"Every axis has the smallest size at which it alone loses no more than {significant(allowed)}"
    return f"{size}; {left}"


def _drops(run: Run) -> Html | None:
    drops: Mapping[str, Mapping[str, float]] = run.plan.get("search", {}).get("drops", {})
    if not drops:
        return None
    per_unit: Mapping[str, int] = run.plan["search"].get("channels_per_unit", {})
    rows = []
    for key, by_size in drops.items():
        said = [f"{size}:{GAP}{significant(drop)}" for size, drop in by_size.items()]
        kept = f"{run.after[key]} of {run.before[key]}"
        kept += f", of {per_unit[key]} channels each" if per_unit.get(key, 1) > 1 else ""
        rows.append([code(key), kept, ", ".join(said) or "keeps its size"])
    lost = "the scores that go at some of its sizes" if run.plan["mode"] == "gradnas" else (
        "what the score loses at each size"
    )  # fmt: skip
    return table(["axis", "kept", lost], rows, left=3, caption="Sensitivity of each axis alone")


def _alone(run: Run) -> Html | None:
    alone: Mapping[str, str] = run.plan.get("search", {}).get("left_alone", {})
    if not alone:
        return None
    items = (tag("li", join([code(path), f": {why}"])) for path, why in alone.items())
    return join([tag("p", "Left alone:", class_="note"), tag("ul", *items)])
