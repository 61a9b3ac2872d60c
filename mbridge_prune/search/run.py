"""A search as `prune` runs it: checked at the door, begun when the scores are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mbridge_prune.calibration.packing import token_fingerprint
from mbridge_prune.dynamic import SliceTable
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.importance import Scores
from mbridge_prune.prune_config import DIVISORS, PruneConfig
from mbridge_prune.repair import NO_REPAIR, Repair
from mbridge_prune.search.callables import allows, identity_of, name_of
from mbridge_prune.search.costs import Costs, Serving
from mbridge_prune.search.reach import check_reachable
from mbridge_prune.search.space import Space

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Search:
    """The search for the best architecture inside the budgets.

    Args:
        table: of this rank's part of the model.
        settings: the keys of `prune(config=...)`.
        budgets: the upper bounds, as they were given.
        divisors: "<hparam>_divisor" -> step; None takes the usual ones.
        mend: how the winner's cut is repaired, and so those of all that get the score.
        whole: the table is of the whole model, on every rank: for what is checked before it is loaded.

    Raises:
        UserError: a setting that cannot be, or a budget that no candidate can keep.
    """

    def __init__(
        self,
        table: SliceTable,
        settings: PruneConfig,
        budgets: Mapping[str, Any],
        divisors: Mapping[str, int] | None,
        mend: Repair = NO_REPAIR,
        whole: bool = False,
    ):
        self.table, self.config, self.budgets, self.mend = table, settings, budgets, mend
        self.whole = whole
        self.divisors = divisors or {f"{name}_divisor": step for name, step in DIVISORS.items()}
        self.serving = serving_of(settings.serving or {})
        if settings.skip_sorting and settings.checkpoint is None:
            raise UserError("a search ranks layers: with skip_sorting give a scores file as checkpoint")
        if settings.export_top_k > settings.top_k:
            raise UserError(
                f"export_top_k={settings.export_top_k} is more than top_k={settings.top_k}: only candidates "
                "that get the score are exported"
            )
        check_reachable(self)
        allows(settings.candidate_filter, table.hparams())  # one that fails fails here, before any work

    def require_text(self) -> None:
        """Finds the held-out text, before anything is measured.

        Raises:
            UserError: there is none.
        """
        held_out = self.config.held_out
        if held_out is None:
            held_out = getattr(self.config.forward_loop, "held_out_ns", None)
        if held_out is None or not len(held_out):
            raise UserError(
                "a search measures candidates on text that calibration has not seen: give "
                "config['held_out'], [samples, sequence] tokens (get_hf_mbridge_calibration_loop(..., "
                "held_out=16) keeps some)"
            )
        self.held_out: torch.Tensor = held_out

    def best(self, scores: Scores) -> dict[str, int]:
        """Runs the search on the sorted model; every hparam's size of the winner."""
        from mbridge_prune.search import search

        self.found = search.search(self, scores)
        return self.found.sizes

    def space(self, layer_order: Sequence[int]) -> Space:
        """What the settings let the search choose from."""
        config = self.config
        return Space.of(
            self.table,
            layer_order,
            self.divisors,
            max_width_pruning=config.max_width_pruning,
            max_depth_pruning=config.max_depth_pruning,
            hparams_to_skip=config.hparams_to_skip,
            bounds=config.search_space,
        )

    def costs(self, layer_order: Sequence[int]) -> Costs:
        """Counts candidates; the first layers of the order are the last to go."""
        width = next(self.table.model.parameters()).element_size()
        return Costs(self.table, layer_order, self.serving, width, self.whole)

    def store_path(self) -> Path | None:
        """The log of candidates."""
        if self.config.candidates is not None:
            return Path(self.config.candidates)
        checkpoint = self.config.checkpoint
        return Path(checkpoint).with_name("candidates.jsonl") if checkpoint is not None else None

    def identity(self, scores: Scores) -> dict[str, Any]:
        """What a measurement is of: it is used again only where all of this is the same."""
        config = self.config
        filtered = config.candidate_filter
        return {
            "model": scores.meta.get("model"),
            "scores": {k: scores.meta.get(k) for k in ("ranking", "data", "tokens", "depth")},
            "ranking": scores.digest(),
            "skip_sorting": config.skip_sorting,
            "held_out": token_fingerprint(self.held_out),
            "budgets": dict(self.budgets),
            "divisors": dict(self.divisors),
            "max_width_pruning": config.max_width_pruning,
            "max_depth_pruning": config.max_depth_pruning,
            "hparams_to_skip": list(config.hparams_to_skip),
            "search_space": {k: dict(v) for k, v in (config.search_space or {}).items()},
            "candidate_filter": None if filtered is None else identity_of(filtered),
            "score_func": self.score_identity(),
            "serving": str(self.serving),
            "repair": [self.mend.kind, getattr(self.mend.loop, "fingerprint", None)],
        }

    def score_name(self) -> str:
        function = self.config.score_func
        return function if isinstance(function, str) else name_of(function)

    def score_identity(self) -> Any:
        function = self.config.score_func
        return function if isinstance(function, str) else identity_of(function)

    def summary(self) -> dict[str, Any]:
        """What plan.json says of the search."""
        best = [{k: r[k] for k in ("sizes", "score", "params")} for r in self.found.ranking]
        return {"score": self.score_name(), **self.found.facts, "best": best}


def serving_of(given: Mapping[str, Any]) -> Serving:
    """Checked settings of what memory and operations are counted for."""
    names = ("batch_size", "seq_length", "kv_dtype")
    for name in given:
        if name not in names:
            raise UserError(f"serving: unknown key {name!r}{nearest(name, names)}; keys: {', '.join(names)}")
    values = dict(given)
    for name in ("batch_size", "seq_length"):
        value = values.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"serving: {name}={value!r} must be an integer of at least 1")
    dtype = values.get("kv_dtype", "bfloat16")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"serving: kv_dtype={dtype!r} is no choice{nearest(dtype, DTYPES)}; "
                            f"choices: {', '.join(DTYPES)}")  # fmt: skip
        values["kv_dtype"] = DTYPES[dtype]
    return Serving(**values)
