"""A finished run, read back from the files of its folder alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbridge_prune.dynamic import DEPTH
from mbridge_prune.errors import UserError
from mbridge_prune.importance.scores import Scores
from mbridge_prune.importance.scores_file import load_scores
from mbridge_prune.report.run_log import RunLog, read_log
from mbridge_prune.report.search_record import Search, read_search

PLAN, SETTINGS, SCORES, CANDIDATES, LOG = (
    "plan.json", "settings.json", "scores.safetensors", "candidates.jsonl", "run.log",
)  # fmt: skip
NEEDED = ("sizes_before", "sizes_after", "params_before", "params_after", "layers_kept")
WITHIN = {
    "num_attention_heads": "num_query_groups",
    "mamba_head_dim": "mamba_num_heads",
    "moe_ffn_hidden_size": "num_moe_experts",
}
"""hparam -> the one whose units its groups are: a removed group takes its units along."""

IN_EACH = ("mamba_head_dim", "moe_ffn_hidden_size")
"""Sizes of these count the units of each group, not of the layer."""


@dataclass(frozen=True)
class Axis:
    """One axis of the unpruned model: its scores and what was kept of it.

    Args:
        place: "layers.3", "mtp.0", or "" where the whole model has one axis.
        scores: [units] importance, or None where the run has no scores.
        groups: the units lie in so many groups of equal width.
        kept: [units] bool.
    """

    hparam: str
    place: str
    scores: np.ndarray | None
    groups: int
    kept: np.ndarray

    @property
    def units(self) -> int:
        return len(self.kept)

    @property
    def layer(self) -> int | None:
        """Number of the layer in the trunk."""
        stack, _, number = self.place.partition(".")
        return int(number) if stack == "layers" and number.isdigit() else None


def short_name(model: str) -> str:
    """A hub name whole, of a folder its last part, of a part of a run two."""
    if not model.startswith(("/", ".", "~")):
        return model
    parts = Path(model).parts
    return "/".join(parts[-2:] if parts[-1] == "hf" or parts[-1].startswith("iter_") else parts[-1:])


@dataclass
class Run:
    """What a run folder says."""

    folder: Path
    plan: dict[str, Any]
    settings: dict[str, Any]
    scores: dict[str, np.ndarray]
    no_scores: str = ""
    """Why there are none."""
    log: RunLog = field(default_factory=RunLog)
    search: Search | None = None
    cut: bool = True
    """False of a search that is not finished, or that found nothing good enough: everything is kept."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def model(self) -> str:
        """The unpruned model."""
        settings = self.settings.get("model", {})
        if settings.get("megatron_path"):
            return short_name(str(Path(settings["megatron_path"]).resolve()))
        return short_name(str(settings.get("hf_path") or "the model"))

    @property
    def before(self) -> dict[str, int]:
        return self.plan["sizes_before"]

    @property
    def after(self) -> dict[str, int]:
        return self.plan["sizes_after"]

    @property
    def layers(self) -> int:
        return self.before[DEPTH]

    @property
    def layers_removed(self) -> list[int]:
        return sorted(set(range(self.layers)) - set(self.plan["layers_kept"]))

    @property
    def experts(self) -> bool:
        """True where not every parameter works on every token."""
        return self.plan.get("active_before") not in (None, 0, self.plan["params_before"])

    @functools.cached_property
    def axes(self) -> dict[str, list[Axis]]:
        """hparam -> its axes in the order of the layers, prediction heads last; depth is left out."""
        found: dict[str, list[Axis]] = {}
        for key in sorted({*self.scores, *self.plan.get("kept", {})}, key=_in_order):
            place, _, hparam = key.rpartition(".")
            if hparam != DEPTH:
                found.setdefault(hparam, []).append(self._axis(key, place, hparam))
        known = [h for h in self.before if h in found]
        return {h: found[h] for h in [*known, *(h for h in found if h not in known)]}

    def _axis(self, key: str, place: str, hparam: str) -> Axis:
        kept, scores = self.plan.get("kept", {}).get(key), self.scores.get(key)
        if kept is None:
            units = len(scores) if scores is not None else 0
            return Axis(hparam, place, scores, 1, np.ones(units, dtype=bool))
        if scores is not None:
            units = len(scores)
        else:
            units = self.before.get(hparam, max(map(len, kept))) * (len(kept) if hparam in IN_EACH else 1)
        mask_gw = _mask(kept, units)
        if mask_gw is None:
            raise UserError(f"{self.folder / PLAN} and {SCORES} do not fit each other in {key}: "
                            "is one of them of another run?")  # fmt: skip
        around = f"{place}.{WITHIN.get(hparam)}"
        if hparam in WITHIN and around in self.plan["kept"]:
            outer = self._axis(around, place, WITHIN[hparam])
            if outer.units == len(kept):
                mask_gw &= outer.kept[:, None]
        return Axis(hparam, place, scores, len(kept), mask_gw.reshape(-1))

    @functools.cached_property
    def kinds(self) -> dict[str, list[int]]:
        """Kind of layer -> numbers of the layers that are it."""
        signs = (
            ("mamba_num_heads", "Mamba"), ("num_attention_heads", "attention"), ("ffn_hidden_size", "MLP"),
            ("num_moe_experts", "experts"), ("moe_ffn_hidden_size", "experts"),
        )  # fmt: skip
        parts: dict[int, list[str]] = {n: [] for n in range(self.layers)}
        for hparam, word in signs:
            for axis in self.axes.get(hparam, []):
                if axis.layer in parts and word not in parts[axis.layer]:
                    parts[axis.layer].append(word)
        kinds: dict[str, list[int]] = {}
        for n, words in parts.items():
            kinds.setdefault(" + ".join(words) or "other", []).append(n)
        return kinds


def read_run(folder: str | Path) -> Run:
    """Reads plan.json, settings.json, the scores, candidates.jsonl and run.log.

    A plan of other settings than settings.json is of an earlier search in the folder, and is left out.

    Raises:
        UserError: no run folder; a file that every finished run has is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such run folder: {folder}")
    search, own = read_search(folder / CANDIDATES), {}
    if (folder / SETTINGS).exists():
        own = read_json(folder / SETTINGS, "the settings of the run are needed")
    plan = read_json(folder / PLAN, "a finished run leaves it") if (folder / PLAN).exists() else {}
    cut = bool(plan) and not (search and own and plan.get("settings", own) != own)
    if not cut and search and "params" in search.head:
        plan = _uncut(search)
    else:
        lacking = [key for key in NEEDED if key not in plan]
        if not plan:
            raise UserError(f"{folder / PLAN} is missing: a finished run leaves it; is this a run folder?")
        if lacking or DEPTH not in plan.get("sizes_before", {}):
            raise UserError(f"{folder / PLAN} lacks {', '.join(lacking or ['sizes_before.num_layers'])}: "
                            "it is no plan of this version")  # fmt: skip
        cut = True
    settings = own or plan.get("settings")
    if settings is None:
        raise UserError(f"{folder / SETTINGS} is missing: the settings of the run are needed")
    scores, why = _read_scores(folder, plan, settings)
    if not cut and scores is not None:
        plan |= {"calibration": scores.meta, "fingerprint": scores.meta.get("model")}
        plan["layer_scores"] = scores.units[DEPTH].tolist() if DEPTH in scores.units else []
    return Run(
        folder=folder.resolve(),
        plan=plan,
        settings=settings,
        scores={key: v.double().numpy() for key, v in scores.units.items()} if scores else {},
        no_scores=why,
        log=read_log(folder / LOG),
        search=search,
        cut=cut,
    )


def _uncut(search: Search) -> dict[str, Any]:
    """A plan that keeps everything: of a search that is not finished, or found nothing good enough."""
    full, params = search.full, search.head["params"]
    return {
        "sizes_before": full, "sizes_after": full, "params_before": params, "params_after": params,
        "layers_kept": list(range(full[DEPTH])), "importance": None, "calibration": {"data": None},
    }  # fmt: skip


def _mask(kept: list[list[int]], units: int) -> np.ndarray | None:
    """[groups, width] bool, True for the places kept; None where they are not places of so many units."""
    if units % len(kept):
        return None
    mask_gw = np.zeros((len(kept), units // len(kept)), dtype=bool)
    try:
        for group, places in enumerate(kept):
            mask_gw[group, places] = True
    except IndexError:
        return None
    return mask_gw


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object of a run folder.

    Raises:
        UserError: it is missing (with `why` it is needed) or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: {why}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _read_scores(
    folder: Path, plan: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[Scores | None, str]:
    """Scores of the run, and why there are none."""
    elsewhere = settings.get("prune", {}).get("scores")
    path = folder / SCORES
    if not path.is_file():
        if not plan.get("calibration"):
            return None, "The weights stood in descending importance already; the run took no scores."
        if not elsewhere:
            raise UserError(f"{path} is missing: the run took its scores from there")
        path = Path(elsewhere)
        if not path.is_file():
            return None, f"The scores file of this run, {elsewhere}, is no longer there."
    return load_scores(path, {"model": plan.get("fingerprint")}), ""


def _in_order(key: str) -> tuple:
    """Trunk before prediction heads, layers by number."""
    place, _, hparam = key.rpartition(".")
    stack, _, number = place.partition(".")
    return (stack != "", stack != "layers", stack, int(number) if number.isdigit() else -1, number, hparam)
