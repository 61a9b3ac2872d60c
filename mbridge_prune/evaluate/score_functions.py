"""Score functions by name: what a search ranks candidates by, and `launch/evaluate.py` prints.

Higher is better for all: `loss` and `kl` are negated.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.calibration.packing import token_fingerprint
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.evaluate.divergence import Reference
from mbridge_prune.evaluate.estimate import Estimate, estimate
from mbridge_prune.evaluate.forward import Progress
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.evaluate.mmlu import answer
from mbridge_prune.evaluate.mmlu_data import read_mmlu
from mbridge_prune.evaluate.mmlu_prompts import prompts

MMLU = re.compile(r"mmlu_(?P<percent>\d+(?:\.\d+)?)pct(?:_(?P<shots>\d+)shot)?_bs(?P<batch>\d+)")
EXAMPLES = ("loss", "kl", "mmlu_10pct_bs1", "mmlu_100pct_5shot_bs8")
FORMS = "loss, kl, mmlu_<P>pct_bs<B>, mmlu_<P>pct_<K>shot_bs<B>, module:function"


class Measure(Protocol):
    """What a score function is made of: the metric's own value, not negated."""

    def __call__(self, model: nn.Module, deal: bool, progress: Progress | None, /) -> Estimate: ...


@dataclass(frozen=True)
class ScoreFunction:
    """`score(model) -> float`, higher is better; the same on every rank.

    Attributes:
        name: as it was asked for.
        fingerprint: plain values that say what was measured; two scores compare where these are equal.
        sign: 1, or -1 where the metric is a loss.
        steps, unit: what `progress` counts.
        counts: what an estimate's `n` counts.
        deal: spread the text over data-parallel ranks; False where every replica holds another candidate.
        whole: it runs whole on any replica: the user's own functions, but for those with an attribute
            `together` that is true. A search gives every replica another candidate.
    """

    name: str
    fingerprint: Mapping[str, Any]
    sign: int
    steps: int
    unit: str
    counts: str
    measure: Measure = field(repr=False)
    deal: bool = True
    whole: bool = False

    def __call__(self, model: nn.Module) -> float:
        return self.sign * self.estimate(model).mean

    def estimate(self, model: nn.Module, progress: Progress | None = None) -> Estimate:
        """The metric itself (loss and KL in nats, accuracy as a share), with its standard error."""
        return self.measure(model, self.deal, progress)


def score_function(
    name: str,
    *,
    tokenizer: Any = None,
    tokens_ns: torch.Tensor | None = None,
    reference: Reference | None = None,
    data: str | Path | None = None,
    seed: int = 0,
    batch: int = 1,
    deal: bool = True,
) -> ScoreFunction:
    """The score function of that name; all that can be refused without a model is refused here.

    Args:
        name: `loss` (mean next-token loss on `tokens_ns`, negated), `kl` (mean KL from the full model at
            the reference's positions, negated), `mmlu_10pct_bs1` or `mmlu_10pct_5shot_bs8` (accuracy on so
            much of every subject, so many examples, prompts a microbatch), or `module:function`: any
            importable `f(model) -> float`. Under pipeline parallelism that is called on every rank, and
            what it returns on the last stage counts.
        tokenizer: for MMLU.
        tokens_ns: [n, s] held-out text, for `loss`.
        reference: of the full model, for `kl`.
        data: MMLU's folder; None is the hub.
        seed: of MMLU's sample (that of `kl` is the reference's).
        batch: sequences a microbatch, for `loss`.
        deal: see `ScoreFunction`.

    Raises:
        UserError: a name that is none of these (with the nearest right one), or a piece that it needs.
    """
    check_name(name)
    if name == "loss":
        if tokens_ns is None:
            raise UserError("score function loss needs text: give tokens_ns")
        return _loss(tokens_ns, batch, deal)
    if name == "kl":
        if reference is None:
            raise UserError("score function kl needs the full model's predictions: give reference")
        return _kl(reference, deal)
    if ":" in name:
        return _imported(name, deal)
    match = MMLU.fullmatch(name)
    assert match is not None
    asked = prompts(tokenizer, float(match["percent"]) / 100, int(match["shots"] or 0), data, seed)
    size = int(match["batch"])

    def measure(model: nn.Module, deal: bool, progress: Progress | None, /) -> Estimate:
        accuracy = answer(model, asked, size, deal, progress=progress)
        return Estimate(accuracy.value, accuracy.se, accuracy.n, accuracy.by_subject)

    facts = {"name": name, "prompts": asked.fingerprint, "questions": len(asked.prompts), "seed": seed}
    return ScoreFunction(name, facts, 1, len(asked.prompts), "questions", "questions", measure, deal)


def check_name(name: str) -> None:
    """Refuses what is no score function's name, with the nearest right one."""
    module, colon, function = name.partition(":")
    if name in ("loss", "kl") or (module and colon and function):
        return
    match = MMLU.fullmatch(name)
    if match is None:
        near = nearest(name, EXAMPLES) or ("mmlu" in name and nearest(EXAMPLES[2], EXAMPLES)) or ""
        raise UserError(f"no score function {name!r}{near}; there are: {FORMS}")
    if not 0 < float(match["percent"]) <= 100 or int(match["batch"]) < 1:
        raise UserError(f"{name}: expected above 0 and up to 100 pct, and a batch size (bs) of at least 1")


def check_available(name: str, data: str | Path | None = None) -> None:
    """Refuses a score whose function cannot be imported, or whose questions cannot be read from a folder.

    What the hub has is not asked for: a plan of seconds needs no network.
    """
    check_name(name)
    if ":" in name:
        load_function(name)
    match = MMLU.fullmatch(name)
    if data is not None and match is None:
        raise UserError(
            f"MMLU data is given ({data}), but the score is {name}: give one such as {EXAMPLES[2]}"
        )
    if data is not None and match is not None:
        for split in ("test", "dev")[: 2 if int(match["shots"] or 0) else 1]:
            read_mmlu(data, split)


def _loss(tokens_ns: torch.Tensor, batch: int, deal: bool) -> ScoreFunction:
    def measure(model: nn.Module, deal: bool, progress: Progress | None, /) -> Estimate:
        return estimate(token_losses(model, tokens_ns, batch, deal, progress))

    facts = {"name": "loss", "tokens": token_fingerprint(tokens_ns)}
    return ScoreFunction("loss", facts, -1, len(tokens_ns), "sequences", "predictions", measure, deal)


def _kl(reference: Reference, deal: bool) -> ScoreFunction:
    def measure(model: nn.Module, deal: bool, progress: Progress | None, /) -> Estimate:
        return estimate(reference.kl(model, None, deal, progress), reference.sequence)

    facts = {"name": "kl", **reference.fingerprint}
    return ScoreFunction("kl", facts, -1, len(reference.tokens_ns), "sequences", "positions", measure, deal)


def _imported(name: str, deal: bool) -> ScoreFunction:
    function, source = load_function(name)

    def measure(model: nn.Module, deal: bool, progress: Progress | None, /) -> Estimate:
        value = runtime.together(lambda: _number(name, called(name, function, model)))
        values = runtime.gather_objects(value, "pp")
        if progress is not None:
            progress(1)
        return Estimate(values[-1], math.inf, 1)

    facts = {"name": name, "source": source}
    return ScoreFunction(name, facts, 1, 1, "calls", "calls", measure, deal, runs_whole(function))


def _number(name: str, value: Any) -> float | None:
    """What a user's function returned: a number, on the last stage, which has the logits."""
    try:
        return float(value)
    except (TypeError, ValueError):
        if runtime.place("pp") < runtime.size("pp") - 1:
            return None
        raise UserError(f"{name} returned {type(value).__name__}, expected a number") from None


def runs_whole(function: Callable[[nn.Module], Any]) -> bool:
    """Whether one replica's ranks alone call a user's function: it does not ask for all `together`."""
    return not getattr(function, "together", False)


def called(name: str, function: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What a user's score function returns.

    Raises:
        UserError: it failed.
    """
    try:
        return function(model)
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"score function {name} failed: {type(error).__name__}: {error}") from error


def load_function(name: str) -> tuple[Callable[[nn.Module], Any], str]:
    """(the function of "module:function", a fingerprint of its module's source).

    Modules are also looked for in the working directory.

    Raises:
        UserError: no such module, a module that fails, no such function in it, or something not callable.
    """
    module_name, _, attribute = name.partition(":")
    with _working_directory():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(
                f"{name}: no module {error.name!r}; it must be importable (installed, on PYTHONPATH, or "
                "in the working directory)"
            ) from error
        except Exception as error:  # the user's own code
            raise UserError(f"{name}: importing {module_name} failed: {error}") from error
    function = getattr(module, attribute, None)
    if function is None:
        have = [n for n, thing in vars(module).items() if callable(thing) and not n.startswith("_")]
        raise UserError(f"{name}: {module_name} has no {attribute!r}{nearest(attribute, have)}")
    if not callable(function):
        raise UserError(f"{name}: {attribute} is no function but {type(function).__name__}")
    source = ""
    with contextlib.suppress(OSError, TypeError):
        source = inspect.getsource(module)
    return function, hashlib.sha256(source.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _working_directory() -> Any:
    """Python looks beside a script, not where it was started."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
