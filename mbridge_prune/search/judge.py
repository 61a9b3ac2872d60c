"""Measures candidates as they would be exported: the real weights, router and configuration, in `select`."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.calibration.loop import CalibrationLoop
from mbridge_prune.dynamic import DEPTH, SliceTable, select
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.divergence import Reference
from mbridge_prune.evaluate.estimate import Estimate, estimate, paired
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.evaluate.score_functions import ScoreFunction as NamedScore
from mbridge_prune.evaluate.score_functions import called, runs_whole, score_function
from mbridge_prune.importance import Scores
from mbridge_prune.repair import NO_REPAIR, Repair
from mbridge_prune.search.budget import BUDGETS
from mbridge_prune.search.callables import name_of
from mbridge_prune.search.costs import Costs
from mbridge_prune.search.store import Record, Store
from mbridge_prune.search.waves import waves

Sizes = Mapping[str, int]
ScoreFunction = Callable[[nn.Module], float]


class Judge:
    """KL of candidates to the full model on held-out text, and the user's score.

    Args:
        table: of the sorted model.
        held_out_ns: [samples, sequence] tokens that calibration has not seen.
        store: where every measurement goes, and where one that was made before is found.
        mend: how cuts are repaired: those of the few that get the score, whose repair is one pass each.
    """

    def __init__(
        self,
        table: SliceTable,
        scores: Scores,
        costs: Costs,
        held_out_ns: torch.Tensor,
        store: Store,
        mend: Repair = NO_REPAIR,
    ):
        self.table, self.scores, self.costs, self.store = table, scores, costs, store
        self.held_out_ns, self.mend = held_out_ns, mend
        self._reference: Reference | None = None
        self._losses: torch.Tensor | None = None
        # A mixture's experts are spread over data-parallel ranks: those work on one candidate together.
        self.replicas = runtime.size("dp") if runtime.size("ep") == 1 else 1

    @property
    def samples(self) -> int:
        """Sequences of held-out text."""
        return len(self.held_out_ns)

    @contextlib.contextmanager
    def candidate(self, sizes: Sizes) -> Iterator[nn.Module]:
        """The model with a candidate's shapes and layers; the full model comes back exactly."""
        with select(self.table, dict(sizes), self._layers(sizes)) as model, mcore.whole_config(model, sizes):
            yield model

    @contextlib.contextmanager
    def as_exported(self, sizes: Sizes) -> Iterator[nn.Module]:
        """That, repaired as it would be for good."""
        with self.mend.tried(self.table, sizes, self._layers(sizes)), self.candidate(sizes) as model:
            yield model

    def _layers(self, sizes: Sizes) -> list[int] | None:
        """The layers that a candidate keeps; None for all."""
        whole = sizes[DEPTH] == self.table.hparams()[DEPTH]
        return None if whole else self.scores.layers_kept(sizes[DEPTH])

    def divergences(
        self, kind: str, candidates: Sequence[Sizes], samples: int, done: Callable[[int], None], **more: Any
    ) -> list[Record]:
        """One record a candidate, in their order: "kl" and "se" in nats over the first `samples`.

        Candidates are spread over data-parallel replicas; each wave is on disk before the next begins.

        Args:
            more: further keys of the records; a list gives one value a candidate.
        """
        missing = [i for i, s in enumerate(candidates) if self.store.find(kind, s, samples) is None]
        if missing:
            self.reference()  # all ranks build it, those without a candidate in the wave too
        done(len(candidates) - len(missing))
        for wave in self._waves(missing, lambda i: self._divergence(candidates[i], samples)):
            for i, measured in wave:
                extra = {k: v[i] if isinstance(v, list) else v for k, v in more.items()}
                record = {"kind": kind, "sizes": dict(candidates[i]), "samples": samples}
                params = int(self.costs.params(candidates[i]))
                self.store.add({**record, **measured, "params": params, **extra})
            done(len(wave))
        found = [self.store.find(kind, s, samples) for s in candidates]
        return [record for record in found if record is not None]

    def scored(
        self, candidates: Sequence[Sizes], score: ScoreFunction | str, done: Callable[[int], None]
    ) -> list[Record]:
        """One record a candidate, in their order: the score, and what the candidate costs.

        Built-in scores deal their text out to the data-parallel replicas, which work on one candidate
        together; of a user's function every replica takes another candidate.

        Raises:
            UserError: a score that is no finite number.
        """
        missing = [i for i, s in enumerate(candidates) if self.store.find("score", s) is None]
        done(len(candidates) - len(missing))
        if missing:
            self._score(candidates, missing, score, done)
        found = [self.store.find("score", s) for s in candidates]
        return [record for record in found if record is not None]

    def _score(
        self,
        candidates: Sequence[Sizes],
        missing: Sequence[int],
        score: ScoreFunction | str,
        done: Callable[[int], None],
    ) -> None:
        function = self.function(score)
        name = score if isinstance(score, str) else name_of(score)
        whole = function.whole if isinstance(function, NamedScore) else runs_whole(function)
        # A loop that is not ours may read another share of the text on every replica: all of them repair.
        whole = whole and (self.mend.kind == "none" or isinstance(self.mend.loop, CalibrationLoop))

        def measure(i: int) -> Record:
            begin = time.monotonic()
            with runtime.apart() if whole and self.replicas > 1 else contextlib.nullcontext():
                told = self.score(candidates[i], score, function)
            return {**told, "seconds": round(time.monotonic() - begin, 2)}

        for wave in self._waves(missing, measure, spread=whole):
            for i, told in wave:
                sizes = dict(candidates[i])
                if told["score"] is None:
                    raise UserError(f"the score function {name} returned no number")
                if not math.isfinite(told["score"]):
                    raise UserError(f"the score function {name} gave {told['score']} for {sizes}")
                costs = {b: float(self.costs.of(b, sizes)) for b in BUDGETS[1:]}
                record = {"kind": "score", "name": name, "sizes": sizes}
                self.store.add({**record, "params": int(self.costs.params(sizes)), **costs, **told})
            done(len(wave))

    def _waves(
        self, missing: Sequence[int], measure: Callable[[int], Record], spread: bool = True
    ) -> Iterator[list[tuple[int, Record]]]:
        """What `measure` says of every candidate, so many at a time as there are replicas.

        Args:
            spread: a candidate a replica; False has all ranks work on one after the other.
        """
        replicas = self.replicas if spread else 1
        return waves(missing, measure, runtime.place("dp") % replicas, replicas)

    def _divergence(self, sizes: Sizes, samples: int) -> dict[str, Any]:
        reference = self.reference()
        with self.candidate(sizes) as model:
            kl_p = reference.kl(model, samples, deal=self.replicas == 1)
        found = estimate(kl_p, reference.sequence[: len(kl_p)])
        told = _told("kl", found)
        return {"kl": told["kl"], "se": told["se"]}

    def reference(self) -> Reference:
        """What the full model says of the held-out text."""
        if self._reference is None:
            self._reference = Reference.of(self.table.model, self.held_out_ns)
        return self._reference

    def function(self, score: ScoreFunction | str) -> ScoreFunction:
        """The score as a function of a model; higher is better."""
        if score == "kl":
            return score_function("kl", reference=self.reference())
        if score == "loss":
            return score_function("loss", tokens_ns=self.held_out_ns)
        assert callable(score)
        return score

    def score(self, sizes: Sizes, score: ScoreFunction | str, function: ScoreFunction) -> Record:
        """The "score" of a candidate, what the last stage, which has the logits, says, and its "se".

        Of "kl" and "loss" also the mean difference to the full model, in nats, position by position.
        """
        if score == "loss":
            before = self._full_losses()
            with self.as_exported(sizes) as model:
                losses = token_losses(model, self.held_out_ns)
            found, change = estimate(losses), paired(losses, before)
            return {"score": -found.mean, "se": known(found.se), "delta": change.mean,
                    "delta_se": known(change.se)}  # fmt: skip
        with self.as_exported(sizes) as model, torch.no_grad():
            if isinstance(function, NamedScore):
                found = function.estimate(model)
                told: Record = {"score": function.sign * found.mean, "se": known(found.se)}
            else:
                value = runtime.together(lambda: called(name_of(function), function, model))
                told = {"score": number_of(value), "se": None}
        told = runtime.gather_objects(told, "pp")[-1]
        if score == "kl":  # the full model's own is 0 at every position
            told |= {"delta": -told["score"], "delta_se": told["se"]}
        return told

    def _full_losses(self) -> torch.Tensor:
        """[samples, positions] losses of the full model."""
        if self._losses is None:
            self._losses = token_losses(self.table.model, self.held_out_ns)
        return self._losses

    def losses(self, sizes: Sizes) -> dict[str, dict[str, Any]]:
        """Held-out loss of the full model ("before") and of a candidate ("after"), and the KL between."""
        before = self._full_losses()
        reference = self.reference()
        with self.as_exported(sizes) as model:
            after, kl_p = token_losses(model, self.held_out_ns), reference.kl(model)
        return {
            "before": _told("loss", estimate(before)),
            "after": _told("loss", estimate(after)),
            "kl": _told("kl", estimate(kl_p, reference.sequence)),
        }


def _told(name: str, found: Estimate) -> dict[str, Any]:
    return {name: found.mean, "se": known(found.se), "n": found.n}


def known(error: float) -> float | None:
    """A standard error, or None where a single cluster leaves it unknown."""
    return error if math.isfinite(error) else None


def number_of(value: Any) -> float | None:
    """What a user's function returned, on this stage."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
