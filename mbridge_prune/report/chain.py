"""Cut, distilled, cut again: what every step of a chain of runs left, on one page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.report.data import PLAN, Run, read_run, short_name
from mbridge_prune.report.headline import measured
from mbridge_prune.report.markup import Html, code, join, table, tag
from mbridge_prune.report.numbers import DASH, duration, exact, share, short, with_error
from mbridge_prune.report.page import document, section, write
from mbridge_prune.report.plot import Plot, figure, sizes, spread

DISTILLED, EVALUATION = "distill.json", "evaluation.json"
"""What launch/distill.py leaves in its run folder, and what `evaluate.py --output` is looked for as."""


@dataclass(frozen=True)
class Step:
    """One model of the chain.

    Args:
        what: how it came to be, in a few words.
        sizes: hparam -> size, of a cut model.
        tokens: that it was trained on in this step.
        evaluation: what evaluate.py wrote of it.
        search: (loss, standard error) on the search's held-out text.
        validation: the last validation loss of a distillation.
    """

    name: str
    what: str
    params: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    tokens: int | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    search: tuple[float, float | None] | None = None
    validation: float | None = None
    seconds: float = 0.0

    def found(self, metric: str) -> tuple[float, float | None] | None:
        """(value, standard error) of a metric of evaluate.py."""
        one = self.evaluation.get("metrics", {}).get(metric)
        return (one["value"], one.get("se")) if one else None


def write_chain(places: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Writes the page of a chain, on rank 0; by default `chain.html` in the last folder.

    Args:
        places: in order, run folders of prune.py and distill.py, and files of `evaluate.py --output` (a model
            that no run made: the parent). A run is shown with the `evaluation.json` in its folder.

    Raises:
        UserError: one of them is neither, or a cut does not go on from what the cut before it left.
    """
    steps = read_chain(places)
    last = next((Path(p) for p in reversed(places) if Path(p).is_dir()), None)
    if output is None and last is None:
        raise UserError("a chain of evaluations alone has no folder for the page: give --output FILE")
    path = Path(output) if output else Path(str(last)) / "chain.html"
    if runtime.rank() == 0:
        write(path, page(steps))
    return path


def read_chain(places: Sequence[str | Path]) -> list[Step]:
    """The steps, the model before the first cut included."""
    if not places:
        raise UserError("a chain needs run folders: one or more, in the order in which they were made")
    steps: list[Step] = []
    cut: Run | None = None
    for place in map(Path, places):
        if place.is_file():
            steps.append(Step(place.stem, "measured", evaluation=_read(place)))
        elif (place / PLAN).is_file():
            run = read_run(place)
            if cut is not None:
                _refuse_gap(cut, run)
            elif not any(step.params for step in steps):
                steps = [_before(run, steps)]
            steps.append(_cut(run))
            cut = run
        elif (place / DISTILLED).is_file():
            steps.append(_distilled(place, cut))
        elif place.is_dir():
            raise UserError(f"{place} is no finished run: it has neither {PLAN} nor {DISTILLED}")
        else:
            raise UserError(f"no such run folder: {place}")
    return steps


def _before(run: Run, measured_before: Sequence[Step]) -> Step:
    """The model that the first cut was made of; what was measured before it is of that."""
    if len(measured_before) > 1:
        names = " and ".join(step.name for step in measured_before)
        raise UserError(f"one evaluation before the first cut is of the parent; got {names}")
    evaluation = measured_before[0].evaluation if measured_before else {}
    loss = measured(run, "before", "loss")
    return Step(run.model, "the parent", run.plan["params_before"], run.before, evaluation=evaluation,
                search=loss and loss[:2])  # fmt: skip


def _cut(run: Run) -> Step:
    loss, words = measured(run, "after", "loss"), [run.plan.get("importance", "minitron")]
    if run.plan.get("repair", "none") != "none":
        words.append(f"repair {run.plan['repair']}")
    return Step(
        run.name, f"cut ({', '.join(words)})", run.plan["params_after"], run.after, search=loss and loss[:2],
        evaluation=_evaluation(run.folder), seconds=sum((run.plan.get("seconds") or {}).values()),
    )  # fmt: skip


def _distilled(folder: Path, cut: Run | None) -> Step:
    result = _read(folder / DISTILLED)
    last = result.get("last_validation") or {}
    return Step(
        folder.resolve().name, f"distilled from {short_name(result.get('teacher') or 'its parent')}",
        cut.plan["params_after"] if cut else None, tokens=result.get("tokens"),
        evaluation=_evaluation(folder), validation=last.get("loss"),
        seconds=sum((result.get("seconds") or {}).values()),
    )  # fmt: skip


def _refuse_gap(a: Run, b: Run) -> None:
    differing = [h for h in {**a.after, **b.before} if a.after.get(h) != b.before.get(h)]
    if differing:
        h = differing[0]
        raise UserError(
            f"{b.folder} does not go on from {a.folder}: one ends with {h}={a.after.get(h)}, the other "
            f"begins with {h}={b.before.get(h)}"
        )


def _evaluation(folder: Path) -> dict[str, Any]:
    return _read(folder / EVALUATION) if (folder / EVALUATION).is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def page(steps: Sequence[Step]) -> str:
    """The whole page."""
    first, last = steps[0], steps[-1]
    kept = f", {share(last.params, first.params)} of its parameters" if first.params and last.params else ""
    head = tag(
        "header",
        tag("p", "a chain of runs", class_="over"),
        tag("h1", f"{first.name} in {len(steps) - 1} steps"),
        tag("p", f"From {_size(first)} to {_size(last)} parameters{kept}.", class_="lead"),
    )
    sections = [section("steps", "Step by step", None, _steps(steps), _texts(steps), _curve(steps)),
                section("sizes", "Sizes", None, _sizes(steps))]  # fmt: skip
    names = ", ".join(step.name for step in steps[1:])
    return document(f"{first.name}: a chain of runs", head, sections, f"Made from the files of {names}.")


def _size(step: Step) -> str:
    return DASH if step.params is None else short(step.params)


def _steps(steps: Sequence[Step]) -> Html:
    """One row a model."""
    first = steps[0].params
    columns: list[tuple[object, list[str]]] = [
        ("parameters", [_size(s) for s in steps]),
        ("of the first", [share(s.params, first) if s.params and first else DASH for s in steps]),
        ("trained on, tokens", [short(s.tokens) if s.tokens else DASH for s in steps]),
        ("loss, nats", [_value(s.found("loss")) for s in steps]),
        ("perplexity", [_perplexity(s.found("loss")) for s in steps]),
        ("KL", [_value(s.found("kl")) for s in steps]),
        *((code(name), [_value(s.found(name)) for s in steps]) for name in _others(steps)),
        ("loss, held-out text of the search", [_value(s.search) for s in steps]),
        ("validation loss", [DASH if s.validation is None else f"{s.validation:.3f}" for s in steps]),
        ("time", [duration(s.seconds) if s.seconds else DASH for s in steps]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != DASH for cell in cells)]
    rows = [[f"{n}. {s.name}", s.what, *(cells[n] for _, cells in shown)] for n, s in enumerate(steps)]
    return table(["", "what", *(name for name, _ in shown)], rows, left=2, caption="What every step left")


def _others(steps: Sequence[Step]) -> list[str]:
    names = dict.fromkeys(name for s in steps for name in s.evaluation.get("metrics", {}))
    return [name for name in names if name not in ("loss", "kl")]


def _value(found: tuple[float, float | None] | None) -> str:
    return DASH if found is None else with_error(*found)


def _perplexity(found: tuple[float, float | None] | None) -> str:
    return DASH if found is None else f"{math.exp(min(found[0], 20)):,.1f}"


def _texts(steps: Sequence[Step]) -> Html:
    """What the losses were measured on; they compare on one text alone."""
    texts = dict.fromkeys(str(s.evaluation["data"]) for s in steps if s.evaluation.get("data"))
    if not texts:
        command = code(f"python launch/evaluate.py --hf-path RUN/hf --data TEXT --output RUN/{EVALUATION}")
        return tag("p", "No step was measured: ", command, " does.", class_="note")
    if len(texts) == 1:
        return tag(
            "p", f"Loss, perplexity and KL: {next(iter(texts))}; ± is one standard error.", class_="note"
        )
    return tag("div", tag("p", f"Measured on different texts, which do not compare: {', '.join(texts)}."),
               class_="warn")  # fmt: skip


def _curve(steps: Sequence[Step]) -> Html | None:
    """Loss against parameters, in the order of the steps."""
    points = [(s.params, found[0]) for s in steps if s.params and (found := s.found("loss"))]
    if len(points) < 2:
        return None
    plot = Plot(sizes([x for x, _ in points]), spread(y for _, y in points), 240, "parameters", "loss")
    plot.line(points, "curve")
    plot.dots(points, "kept-dot")
    said = "; ".join(f"{short(x)}: {y:.3f}" for x, y in points) + "."
    return figure("Loss against parameters", said, None, plot.html(f"Loss of every step. {said}"))


def _sizes(steps: Sequence[Step]) -> Html:
    """Every size of the models that a cut left."""
    cut = [s for s in steps if s.sizes]
    names = dict.fromkeys(hparam for s in cut for hparam in s.sizes)
    rows = [[code(h), *(exact(s.sizes[h]) if h in s.sizes else DASH for s in cut)] for h in names]
    return join([table(["", *(s.name for s in cut)], rows, caption="Sizes of every cut"),
                 tag("p", "Distilling changes no size.", class_="note")])  # fmt: skip
