"""report.html of a distillation, and the model card inside the distilled model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.distill.progress import LOSSES, read_losses
from mbridge_prune.distill.settings import Settings
from mbridge_prune.errors import UserError
from mbridge_prune.report.markup import Html, code, numbers, table, tag
from mbridge_prune.report.page import REPORT, document, say, section, write
from mbridge_prune.report.plot import Linear, Plot, figure, legend, spread
from mbridge_prune.report.versions import versions

RESULT = "distill.json"
POINTS = 400
"""Training losses drawn at most; more are averaged over runs of steps."""


def write_report(folder: Path) -> Path:
    """Writes report.html of a run folder, from its files alone, on rank 0.

    Raises:
        UserError: the folder holds no finished distillation.
    """
    path = folder / REPORT
    if runtime.rank() == 0:
        try:
            result = json.loads((folder / RESULT).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no finished distillation: {error}") from error
        write(path, page(folder.name, result, read_losses(folder / LOSSES)))
    return path


def page(name: str, result: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        result: what distill.json holds.
        lines: of losses.jsonl.
    """
    student, teacher = (Path(result[role]).name or result[role] for role in ("student", "teacher"))
    head = tag(
        "header",
        tag("p", "distillation report", class_="over"),
        tag("h1", f"{student}, distilled from {teacher}"),
        tag(
            "p", f"{result['steps']:,} steps, {result['tokens']:,} tokens. {_verdict(result)}", class_="lead"
        ),
    )
    parts = {k: v for k, v in result["settings"].items() if isinstance(v, Mapping)}
    tables = [
        table([part, ""], [[code(key), say(value)] for key, value in values.items()], left=2,
              caption=f"Settings: {part}")
        for part, values in parts.items()
    ]  # fmt: skip
    tables.append(table(["made with", ""], list(result["versions"].items()), left=2, caption="Versions"))
    sections = [
        section("losses", "Loss curves", None, *_curves(lines)),
        section("settings", "Settings and versions", None, tag("div", *tables, class_="settings")),
    ]
    return document(f"{student}: distillation report", head, sections, f"Made from the files of {name}/.")


def _verdict(result: Mapping[str, Any]) -> str:
    first, last = result.get("first_validation"), result.get("last_validation")
    if not first or not last:
        return "It was not validated."
    return f"Validation loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at the end."


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[Html]:
    trained = [line for line in lines if "train" in line]
    valid = [line for line in lines if "valid" in line]
    if not trained:
        return [tag("p", "No step was made.", class_="note")]
    charts = []
    for name in trained[-1]["train"]:
        points = smooth([(line["step"], line["train"][name]) for line in trained])
        checks = [(line["step"], line["valid"][name]) for line in valid if name in line["valid"]]
        charts.append(_curve(name, points, checks))
    rates = smooth([(line["step"], line["lr"]) for line in trained])
    norms = smooth([(line["step"], line["grad_norm"]) for line in trained if line["grad_norm"] is not None])
    charts.append(_curve("learning rate", rates, []))
    if norms:
        charts.append(_curve("norm of the gradient", norms, []))
    rows = [[str(line["step"]), *(f"{value:.4f}" for value in line["valid"].values())] for line in valid]
    if rows:
        head = ["step", *valid[0]["valid"]]
        charts.append(
            numbers("The numbers of every validation", table(head, rows, caption="Validation losses"))
        )
    return charts


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `POINTS` points, each the mean of a run of steps."""
    each = math.ceil(len(points) / POINTS)
    groups = [points[i : i + each] for i in range(0, len(points), each)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _curve(name: str, points: list[tuple[float, float]], checks: list[tuple[float, float]]) -> Html:
    y = spread([value for _, value in (*points, *checks)])
    plot = Plot(Linear(0, max(step for step, _ in points), 6), y, 240, "step", name)
    plot.line(points, "curve")
    plot.dots(checks, "kept-dot")
    keys = legend(("front", "training"), ("dot kept", "validation")) if checks else None
    said = f"{points[0][1]:.4g} at step {points[0][0]:,}, {points[-1][1]:.4g} at step {points[-1][0]:,}."
    return figure(name.capitalize(), said, keys, plot.html(f"{name} by step: {said}"))


def model_card(result: Mapping[str, Any]) -> str:
    """Markdown with Hugging Face front matter."""
    last = result.get("last_validation")
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [pruned, distilled, mbridge_prune]",
            "---",
            "",
            "# A pruned and distilled model",
            "",
            f"`{result['student']}`, distilled from its parent `{result['teacher']}` by `mbridge_prune`.",
            "",
            f"- {result['tokens']:,} tokens in {result['steps']:,} steps; {result['loss']}",
            f"- validation loss at the end: {last['loss']:.4f}" if last else "- not validated",
            "",
            "Load it with transformers' `from_pretrained`, as you would its parent.",
            "",
        ]
    )


def outcome(settings: Settings, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What distill.json holds."""
    checks = [
        {"step": line["step"], **line["valid"]}
        for line in read_losses(settings.run_folder() / LOSSES)
        if "valid" in line
    ]
    return {
        "teacher": settings.model.teacher,
        "student": settings.model.student,
        "steps": settings.steps(),
        "tokens": settings.steps() * settings.tokens_a_step(),
        "loss": loss_in_words(settings),
        "first_validation": checks[0] if checks else None,
        "last_validation": checks[-1] if checks else None,
        "seconds": dict(seconds),
        "versions": versions(),
        "settings": settings.to_dict(),
    }


def loss_in_words(settings: Settings) -> str:
    """What the student learns from, as a person would say it."""
    loss = settings.loss
    said = f"forward KL at temperature {loss.temperature:g}"
    if loss.top_k:
        said += f" to the teacher's top {loss.top_k}"
    if loss.lm_weight:
        said = f"{1 - loss.lm_weight:g} x {said} + {loss.lm_weight:g} x next-token loss"
    return said
