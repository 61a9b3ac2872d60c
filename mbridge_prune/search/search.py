"""The search, step by step: space, single cuts, surrogate, successive halving, scores, winner."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbridge_prune.dynamic import DEPTH
from mbridge_prune.errors import UserError
from mbridge_prune.importance import Scores
from mbridge_prune.prune_config import PruneConfig
from mbridge_prune.report.console import console, progress_bar, space_table
from mbridge_prune.search.budget import resolve
from mbridge_prune.search.candidates import Candidates, inside_budget
from mbridge_prune.search.judge import Judge
from mbridge_prune.search.run import Search
from mbridge_prune.search.space import Space
from mbridge_prune.search.store import Record, Store
from mbridge_prune.search.surrogate import Surrogate, single_cuts, spearman

log = logging.getLogger("mbridge_prune")

PAIRS = 8
"""Candidates that are measured to check the surrogate."""
WIDER = 4
"""So many times `top_k` candidates enter the halving."""


class NotGoodEnough(UserError):
    """The best score is below `score_lower_bound`; everything measured is in candidates.jsonl."""


@dataclass
class Found:
    """The best architectures, best first.

    Args:
        ranking: the records of their scores.
        facts: what plan.json says of the search.
        loss: held-out loss before and after, and the KL between, of the best.
    """

    ranking: list[Record]
    facts: dict[str, Any]
    loss: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.ranking[0]["sizes"])


def search(run: Search, scores: Scores) -> Found:
    """Finds the architecture inside the budgets with the best score. The model must be sorted.

    Raises:
        UserError: nothing is inside the budgets.
        NotGoodEnough: no score is good enough.
    """
    order = scores.layer_order()
    costs, space = run.costs(order), run.space(order)
    limits = resolve(run.budgets, costs)
    store = Store(run.store_path(), run.identity(scores))
    console().print(space_table(space.choices, limits))
    full = run.table.hparams()
    if not store.of("search"):
        store.add({"kind": "search", "full": full, "params": int(costs.params({})), "space": space.choices,
                   "budgets": limits, "grid": space.size()})  # fmt: skip
    judge = Judge(run.table, scores, costs, run.held_out, store, run.mend)
    surrogate = _surrogate(judge, space, full)
    candidates = inside_budget(space, costs, limits, surrogate, run.config.candidate_filter)
    log.info("%s real candidates, %s inside the budget", f"{candidates.grid:,}", f"{candidates.inside:,}")
    if not store.of("cloud"):
        store.add({"kind": "cloud", "in_budget": candidates.inside, **candidates.cloud})
    chosen = [candidates.sizes(n) for n in range(min(WIDER * run.config.top_k, len(candidates.predicted)))]
    correlation = _check_surrogate(judge, candidates, surrogate)
    finalists = _halve(judge, chosen, surrogate, run.config.top_k)
    ranking = _score(judge, finalists, run)
    best, bound = ranking[0], run.config.score_lower_bound
    if bound is not None and best["score"] < bound:
        raise NotGoodEnough(
            f"the best {run.score_name()} found is {best['score']:.6g}, below score_lower_bound={bound}; "
            "nothing was cut"
        )
    winner = store.find("winner", best["sizes"])
    if winner is None:
        winner = store.add({**best, "kind": "winner", "loss": judge.losses(best["sizes"])})
    elif store.of("winner")[-1]["sizes"] != best["sizes"]:  # another top_k had another winner meanwhile
        winner = store.add(winner)
    _export(judge, ranking, run.config)
    facts = {"budgets": limits, "grid": candidates.grid, "in_budget": candidates.inside,
             "surrogate_rank_correlation": correlation}  # fmt: skip
    return Found(ranking, facts, winner["loss"])


def _surrogate(judge: Judge, space: Space, full: Mapping[str, int]) -> Surrogate:
    """Measures every dimension alone and fits their curves."""
    cuts = single_cuts(space, full)
    sizes = [judge.table.settle({hparam: size}) for hparam, size in cuts]
    with progress_bar("single cuts", len(cuts), "candidates") as step:
        records = judge.divergences("axis", sizes, judge.samples, step)
    measured: dict[str, dict[int, float]] = {}
    for (hparam, size), record in zip(cuts, records, strict=True):
        measured.setdefault(hparam, {})[size] = record["kl"]
    return Surrogate.fit(full, measured)


def _check_surrogate(judge: Judge, candidates: Candidates, surrogate: Surrogate) -> float | None:
    """Rank correlation of prediction and measurement, over candidates from the best to the worst kept."""
    last = len(candidates.predicted) - 1
    places = sorted({round(last * i / max(1, PAIRS - 1)) for i in range(PAIRS)})
    pairs = [candidates.sizes(place) for place in places]
    predicted = [surrogate.of(sizes) for sizes in pairs]
    samples = max(1, judge.samples // 2)
    with progress_bar("surrogate check", len(pairs), "candidates") as step:
        records = judge.divergences("pair", pairs, samples, step, predicted=predicted)
    correlation = spearman(predicted, [record["kl"] for record in records])
    few = math.isnan(correlation)
    said = "too few candidates for a rank correlation" if few else f"rank correlation {correlation:.2f}"
    log.info("surrogate against %d measured candidates: %s", len(records), said)
    if not judge.store.of("surrogate"):
        judge.store.add({"kind": "surrogate", "curves": surrogate.curves,
                         "spearman": None if few else correlation, "pairs": len(records)})  # fmt: skip
    return None if few else correlation


def _halve(
    judge: Judge, chosen: Sequence[dict[str, int]], surrogate: Surrogate, top_k: int
) -> list[dict[str, int]]:
    """Successive halving: many candidates on little text, few on much."""
    rounds = max(0, math.ceil(math.log2(len(chosen) / top_k))) if len(chosen) > top_k else 0
    remaining = list(chosen)
    for number in range(rounds):
        samples = max(1, judge.samples >> (rounds - number))
        with progress_bar(f"halving {number + 1}/{rounds}", len(remaining), "candidates") as step:
            predicted = [surrogate.of(sizes) for sizes in remaining]
            records = judge.divergences(
                "halving", remaining, samples, step, predicted=predicted, round=number
            )
        order = sorted(range(len(remaining)), key=lambda i, r=records: (r[i]["kl"], i))  # type: ignore[misc]
        keep = max(top_k, math.ceil(len(remaining) / 2))
        remaining = [remaining[i] for i in order[:keep]]
    return remaining[:top_k]


def _score(judge: Judge, finalists: Sequence[dict[str, int]], run: Search) -> list[Record]:
    """The score of every finalist; the best first, the smaller one of equals."""
    with progress_bar(f"score {run.score_name()}", len(finalists), "candidates") as step:
        records = judge.scored(finalists, run.config.score_func, step)
    return sorted(records, key=lambda r: (-r["score"], r["params"]))


def _export(judge: Judge, ranking: Sequence[Record], settings: PruneConfig) -> None:
    """Hands the best candidates to the user, each in its own shapes."""
    if settings.export_candidate is None:
        return
    for place, record in enumerate(ranking[: settings.export_top_k]):
        sizes = dict(record["sizes"])
        with judge.as_exported(sizes) as model:
            settings.export_candidate(place, model, sizes, judge.scores.layers_kept(sizes[DEPTH]))
