"""The search against the truth: small models, the true loss of every candidate inside the budget.

    python tests/benchmarks/whole_space.py [wiki experts glassllm stories] [--seeds 0 1 2] [--budgets 60% 70% 80%]

Every candidate of the grid is measured on text that neither calibration nor the search has seen. Against this
truth stand the search's winner, and the winner of the rule "score the candidates nearest to the budget" given
as many scores as the search (`top_k`), and given all that the search has measured, as scores. Scores and measurements are
of the same text, by the same code. What is measured is kept in the cache folder: a second run, of a changed
search, measures the truth no more.

`small_models.py` says which models these are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the tests' own builders of tiny models

from measuring import load, table_of
from nearest_to_budget import nearest_to
from small_models import LENGTH, SMALL, Small, work_folder

import mbridge_prune as mbp
from mbridge_prune.dynamic import sort
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.mcore_minitron import score_model
from mbridge_prune.prune_config import PruneConfig, get_mcore_minitron_config
from mbridge_prune.search.judge import Judge
from mbridge_prune.search.run import Search
from mbridge_prune.search.store import Store

BOUNDS = {"max_width_pruning": 0.5, "max_depth_pruning": 0.5}


@dataclass
class Row:
    """One search. Losses are in nats above the best candidate inside the budget; ranks count from 0.

    Where the space was too large to measure (`rank` and `best` are None), they are above the full model's.
    """

    model: str
    seed: int
    budget: str
    inside: int
    rank: int | None
    search: float
    nearest: float
    nearest_more: float
    measured: float
    dense: float
    best: float | None
    spearman: float | None

    @property
    def share(self) -> float:
        """The share of the candidates inside the budget that are better than the winner."""
        return float("nan") if self.rank is None else self.rank / self.inside

    def line(self) -> str:
        numbers = [self.search, self.nearest, self.nearest_more]
        place = " | | " if self.rank is None else f"{self.rank + 1} | {self.share:.1%} | "
        return (
            f"| {self.model} | {self.seed} | {self.budget} | {self.inside} | {place}"
            f"{'' if self.best is None else f'{self.best - self.dense:.3f}'} | "
            + " | ".join(f"{n:.3f}" for n in numbers)
            + " | "
            f"{self.measured:.1f} | {'' if self.spearman is None else f'{self.spearman:.2f}'} |"
        )


HEAD = (
    "| model | seed | budget | candidates | place | better ones | the best loses | search | nearest, top_k scores | "
    "nearest, all that the search measured | measured, in scores | rank correlation |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"some of {', '.join(SMALL)} (default: all)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["60%", "70%", "80%"])
    parser.add_argument("--top-k", type=int, default=PruneConfig().top_k)
    parser.add_argument("--score", choices=("kl", "loss"), default="kl")
    parser.add_argument(
        "--too-large",
        action="store_true",
        help="measure the winners alone: losses above the full model's, no places",
    )
    parser.add_argument("--importance", default=PruneConfig().importance)
    options = parser.parse_args()
    rows = []
    print(HEAD)
    for name in options.models or SMALL:
        for seed in options.seeds:
            with contextlib.redirect_stdout(sys.stderr):
                subject = Subject(name, SMALL[name](seed), seed, options.importance, options.too_large)
            for budget in options.budgets:
                with contextlib.redirect_stdout(sys.stderr):
                    rows.append(subject.searched(budget, options.top_k, options.score))
                print(rows[-1].line(), flush=True)
    print("\n" + summary(rows))


class Subject:
    """A sorted model, and the truth about its candidates."""

    def __init__(self, name: str, small: Small, seed: int, importance: str, too_large: bool = False):
        self.too_large = too_large
        self.name, self.small, self.seed = name, small, seed
        self.loop = mbp.CalibrationLoop(small.calibration_ns, 1, held_out_ns=small.held_out_ns)
        model = load(small.path, length=LENGTH).unwrapped_model
        config = {"forward_loop": self.loop, "importance": importance, "repair": "none"}
        self.scores = score_model(model, config)
        self.table = table_of(model)
        sort(self.table, self.scores.orders(self.table))
        self.file = work_folder() / f"{small.path.name}-{seed}-{importance}.jsonl"
        self.truth = {k: v for line in self._lines() for k, v in json.loads(line).items()}
        self.dense = self._true(self.table.hparams())

    def searched(self, budget: str, top_k: int, score: str) -> Row:
        """Runs a search, and the rule, and looks both up in the truth."""
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "candidates.jsonl"
            settings = PruneConfig(
                forward_loop=self.loop, top_k=top_k, score_func=score, candidates=log, **BOUNDS
            )
            run = Search(
                self.table, settings, {"params": budget}, get_mcore_minitron_config(**self.small.space)
            )
            run.require_text()
            winner = run.best(self.scores)
            records = [json.loads(line) for line in log.read_text().splitlines()]
        order = self.scores.layer_order()
        costs, space = run.costs(order), run.space(order)
        limit = next(r for r in records if r["kind"] == "search")["budgets"]["params"]
        inside = nearest_to(limit, space, costs, sys.maxsize)
        chosen, true = self._true(winner), None if self.too_large else [self._true(sizes) for sizes in inside]
        best, rank = (None, None) if true is None else (min(true), sum(t < chosen for t in true))
        base = self.dense if best is None else best
        whole = len(self.small.held_out_ns)
        text = sum(whole if r["kind"] == "score" else r.get("samples", 0) for r in records) / whole
        judge = Judge(self.table, self.scores, costs, run.held_out, Store(None, {}))
        function = judge.function(score)

        def rule(count: int) -> float:
            """True loss of what scores best among so many candidates nearest to the budget."""
            scored = [
                (judge.score(sizes, score, function)["score"], n) for n, sizes in enumerate(inside[:count])
            ]
            return self._true(inside[max(scored)[1]])

        spearman = next((r["spearman"] for r in records if r["kind"] == "surrogate"), None)
        return Row(
            self.name, self.seed, budget, len(inside), rank, chosen - base, rule(top_k) - base,
            rule(round(text)) - base, text, self.dense, best, spearman,
        )  # fmt: skip

    def _true(self, sizes: dict[str, int]) -> float:
        """The loss of a candidate on the test text, measured once."""
        key = json.dumps(dict(sorted(sizes.items())))
        if key not in self.truth:
            judge: Any = Judge(self.table, self.scores, None, self.small.held_out_ns, Store(None, {}))  # type: ignore[arg-type]
            with judge.candidate(sizes) as model, torch.no_grad():
                self.truth[key] = float(token_losses(model, self.small.test_ns, 8).double().mean())
            with self.file.open("a") as file:
                file.write(json.dumps({key: self.truth[key]}) + "\n")
        return self.truth[key]

    def _lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []


def summary(rows: Sequence[Row]) -> str:
    """A table of means, a line a model and one of all."""
    lines = [
        "| model | searches | within the best 5 % | worst place | search | nearest, top_k scores | "
        "nearest, as much text | search better / equal / worse than nearest |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    ]
    names = list(dict.fromkeys(row.model for row in rows))
    for name in [*names, "all"]:
        of = [row for row in rows if name in (row.model, "all")]
        means = [
            statistics.mean(getattr(r, what) for r in of) for what in ("search", "nearest", "nearest_more")
        ]
        compared = [(r.search > r.nearest) - (r.search < r.nearest) for r in of]
        shares = [r.share for r in of if r.rank is not None]
        places = f"{sum(s <= 0.05 for s in shares)} of {len(shares)} | {max(shares):.1%}" if shares else " | "
        lines.append(
            f"| {name} | {len(of)} | {places} | "
            + " | ".join(f"{mean:.4f}" for mean in means)
            + f" | {compared.count(-1)} / {compared.count(0)} / {compared.count(1)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
