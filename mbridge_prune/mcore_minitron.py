"""The LLM mode: wrap, score, rank, sort, cut, check. Reads like the README's "what happens"."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.calibration.loop import CalibrationLoop
from mbridge_prune.dynamic import DEPTH, Counter, SliceTable, shapes, shrink, sort
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mode import evaluating
from mbridge_prune.importance import (
    Collector,
    Scores,
    load_scores,
    model_fingerprint,
    save_scores,
    score,
)
from mbridge_prune.importance.greedy import greedy_depth
from mbridge_prune.importance.weighted import WeightedRanking
from mbridge_prune.plan import Plan
from mbridge_prune.prune_config import GREEDY, HPARAMS, PruneConfig, get_mcore_minitron_config
from mbridge_prune.repair import Repair, Room
from mbridge_prune.report.console import progress_bar
from mbridge_prune.search.budget import budgets_of
from mbridge_prune.search.run import Search

log = logging.getLogger("mbridge_prune")


def prune(
    model: nn.Module,
    constraints: Mapping[str, Any],
    config: Mapping[str, Any],
    space: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Plan]:
    """The steps, in order. See `mbridge_prune.prune`."""
    settings = PruneConfig.of(config)
    divisors = get_mcore_minitron_config(**space) if space is not None else None
    budgets = budgets_of(constraints)
    room = Room(settings.repair_memory_gb, settings.repair_offload)
    mend = Repair(settings.repair_made(), settings.forward_loop, room)
    if settings.repair == "auto" and mend.kind == "none":
        log.info("no repair: least squares is fitted on calibration text (full sequences), and there is none")
    wanted = {} if budgets else export_config(constraints)
    refuse_unsuitable(model)
    table = table_of(model)
    runtime.together(lambda: check_sizes(table, wanted, divisors))
    check_experts(table, settings.experts)
    search = Search(table, settings, budgets, divisors, mend) if budgets else None
    if search is not None:
        search.require_text()
    sizes = table.settle(wanted)

    every = list(range(table.hparams()[DEPTH]))
    fewest = sizes[DEPTH] if search is None else min(search.space(every).choices[DEPTH])
    needs_depth = bool(budgets) or sizes[DEPTH] < len(every)
    with evaluating(model):
        scores = _scores(table, settings, needs_depth, fewest)
        if scores is not None and not settings.skip_sorting:
            orders = runtime.together(lambda: scores.orders(table))
            with progress_bar("sorting", len(table.entries), "tensors") as step:
                sort(table, orders, step)
        if search is not None and scores is not None:
            sizes = search.best(scores)
    layers = list(range(table.hparams()[DEPTH]))
    if sizes[DEPTH] < len(layers):
        assert scores is not None
        layers = scores.layers_kept(sizes[DEPTH])

    plan = _plan(table, sizes, layers, scores, settings, mend.kind)
    stay = layers if len(layers) < plan.sizes_before[DEPTH] else None
    plan.repaired = mend.make(table, sizes, stay)
    if search is not None:
        plan.search, plan.loss = search.summary(), search.found.loss
    with progress_bar("slicing", len(table.entries), "tensors") as step:
        shrink(table, sizes, stay, step)
    stages = runtime.gather_objects(len(table.layers.numbers) if table.layers else 0, "pp")
    mcore.after_cut(mcore.language_model(model), stages, sizes)
    real = real_params(model)
    if real != plan.params_after:
        raise RuntimeError(f"planned {plan.params_after:,} parameters, the model has {real:,}: a bug")
    log.info(
        "pruned %s to %s parameters (%.1f %%)",
        f"{plan.params_before:,}", f"{real:,}", 100 * real / plan.params_before,
    )  # fmt: skip
    return model, plan


def score_model(model: nn.Module, config: Mapping[str, Any]) -> Scores:
    """Scores alone, under any parallel layout; nothing is cut. See `mbridge_prune.score`."""
    settings = PruneConfig.of(config)
    refuse_unsuitable(model, scoring=True)
    table = table_of(model)
    check_experts(table, settings.experts)
    full = table.hparams()[DEPTH]
    fewest = math.ceil(full * (1 - settings.max_depth_pruning) - 1e-9)
    with evaluating(model):
        scores = _scores(table, settings, needs_depth=False, fewest=fewest)
    assert scores is not None
    return scores


def table_of(model: nn.Module) -> SliceTable:
    """The slice table of this rank's part of a model, with the axes that only other stages hold."""
    table = runtime.together(lambda: SliceTable.of(model, mcore.root_scope(model)))
    for part in runtime.gather_objects(table.axes, "pp"):
        table.elsewhere.update({key: axis for key, axis in part.items() if key not in table.axes})
    return table


def export_config(constraints: Mapping[str, Any]) -> dict[str, int]:
    """The manual target out of the constraints.

    Raises:
        UserError: no `export_config`, or an empty one.
    """
    target = constraints.get("export_config")
    if not isinstance(target, Mapping) or not target:
        raise UserError(
            "constraints need an export_config with at least one hparam and its size, or a budget"
        )
    return dict(target)


def check_sizes(
    table: SliceTable, sizes: Mapping[str, int], divisors: Mapping[str, int] | None = None
) -> None:
    """Refuses sizes that do not fit the model, its groups, or the divisors the user gave."""
    table.check(sizes, HPARAMS)
    full = table.hparams()
    for hparam, size in sizes.items():
        step = (divisors or {}).get(f"{hparam}_divisor", 1)
        if size % step and size != full[hparam]:
            below = size // step * step
            choices = [str(n) for n in (below, below + step) if 0 < n <= full[hparam]]
            raise UserError(
                f"{hparam}={size} is not a multiple of {hparam}_divisor={step}; "
                f"nearest choices: {', '.join(choices) or full[hparam]}"
            )


def check_experts(table: SliceTable, experts: str) -> None:
    """Refuses a ranking of experts that has no effect, or that this model's forward does not show."""
    if experts == "gated":
        return
    if "num_moe_experts" not in table.hparams():
        raise UserError(f"experts={experts!r} has no effect: this model has no routed experts; leave it out")
    if getattr(mcore.language_model(table.model).config, "moe_apply_probs_on_input", False):
        raise UserError(
            f"experts={experts!r} is not to be had: this model multiplies what its experts read by the "
            "router's probability (moe_apply_probs_on_input); use experts='gated'"
        )


def refuse_unsuitable(model: nn.Module, scoring: bool = False) -> None:
    """Refuses wrappers and parallel layouts that cannot be cut in place (or, scoring, measured)."""
    if type(model).__name__ in ("DistributedDataParallel", "Float16Module", "list"):
        raise UserError(
            f"prune takes the unwrapped model, not {type(model).__name__}: pass unwrapped_model, before DDP"
        )
    mcore.refuse_layout(getattr(model, "config", None), scoring)
    if not scoring and any(hasattr(p, "main_grad") for p in model.parameters()):
        raise UserError("the parameters belong to a DDP buffer: prune before wrapping the model in DDP")


def real_params(model: nn.Module) -> int:
    """Parameters of the whole model, read off its tensors (a tied copy counts once)."""
    tower = mcore.language_model(model)
    skip = set()
    if not tower.pre_process:
        names = ["output_layer.weight"] if tower.share_embeddings_and_output_weights else []
        names += ["embedding.word_embeddings.weight"] if getattr(tower, "mtp_process", False) else []
        skip = {id(p) for n, p in tower.named_parameters() if n in names}
    experts = {id(p) for m in model.modules() if _is_experts(m) for p in m.parameters()}
    local = sum(p.numel() for p in model.parameters() if id(p) not in skip and id(p) not in experts)
    routed = sum(p.numel() for p in model.parameters() if id(p) in experts)
    return sum(runtime.gather_objects(local + routed * runtime.size("ep"), "pp"))


def _is_experts(module: nn.Module) -> bool:
    return type(module).__name__ in ("SequentialMLP", "TEGroupedMLP")


def count(table: SliceTable, layer_order: list[int] | None = None) -> Counter:
    """The parameter counter of the whole model, all pipeline stages together."""
    everything = [s for part in runtime.gather_objects(shapes(table), "pp") for s in part]
    return Counter(everything, layer_order)


def _scores(table: SliceTable, settings: PruneConfig, needs_depth: bool, fewest: int) -> Scores | None:
    """Scores from the file if there is one, otherwise from the forward loop.

    Args:
        needs_depth: layers may go.
        fewest: layers that may be left.
    """
    path = Path(settings.checkpoint) if settings.checkpoint else None
    loop = settings.forward_loop
    expect = {
        "model": model_fingerprint(table),
        "ranking": settings.importance,
        "data": getattr(loop, "fingerprint", None),
    }
    exists = runtime.gather_objects(path is not None and path.exists())[0]
    if path is not None and exists:
        scores = load_scores(path, expect)
        if fewest < table.hparams()[DEPTH]:
            _check_depth(path, scores, settings.depth, table.hparams()[DEPTH] - fewest)
        if "num_moe_experts" in table.hparams():
            _check_kind(path, scores, "experts", "gated", settings.experts)
        log.info("scores read from %s: no scoring pass needed", path)
        return scores
    if settings.skip_sorting:
        if needs_depth:
            raise UserError(
                "skip_sorting says how channels stand, not which layers matter: to prune num_layers "
                "give a scores file in config['checkpoint']"
            )
        return None
    if settings.pad_token_id is not None and runtime.size("ep") > 1:
        raise UserError(
            "pad_token_id is not supported with expert parallel ranks, whose experts do not know where "
            "their tokens stood; use full sequences (get_hf_mbridge_calibration_loop packs them) or ep=1"
        )
    if settings.depth in GREEDY:
        settings.check_greedy()
    if loop is None:
        where = f"{path} does not exist" if path else "no checkpoint is given"
        raise UserError(f"config needs a forward_loop to score the model ({where})")
    weighted = _weighted(table, settings)
    skip = weighted.axes if weighted is not None else ()
    collector = Collector(table, settings.pad_token_id, skip, settings.experts == "gate_free")
    with collector, torch.no_grad(), ExitStack() as more:
        if weighted is not None:
            more.enter_context(weighted)
        loop(table.model)
    scores = score(table, collector)
    if weighted is not None:
        scores.units.update(weighted.units())
    if settings.depth in GREEDY and fewest < table.hparams()[DEPTH]:
        assert isinstance(loop, CalibrationLoop)
        removals = table.hparams()[DEPTH] - fewest
        scores.units[DEPTH] = greedy_depth(table, loop, removals, settings.depth)
        scores.meta |= {"depth": settings.depth, "removals": removals}
    if settings.experts != "gated":
        scores.meta["experts"] = settings.experts
    scores.meta.update({k: v for k, v in expect.items() if v is not None})
    if path is not None:
        save_scores(scores, path)
        log.info("scores written to %s", path)
    return scores


def _check_depth(path: Path, scores: Scores, depth: str, removals: int) -> None:
    """Refuses layer scores of another kind, and a greedy order that ends too early."""
    _check_kind(path, scores, "depth", "cosine", depth)
    known = scores.meta.get("removals", removals)
    if known < removals:
        raise UserError(
            f"{path} ranks {known} layers for removal, and {removals} may go: give another path or delete "
            "the file to score anew"
        )


def _check_kind(path: Path, scores: Scores, key: str, default: str, asked: str) -> None:
    """Refuses scores of layers ("depth") or of experts that another setting has made."""
    found, what = scores.meta.get(key, default), {"depth": "layers"}.get(key, key)
    if found != asked:
        raise UserError(
            f"{path} ranks {what} by {found}, and {key}={asked!r} was asked for: ask for {found!r}, or give "
            "another path or delete the file to score anew"
        )


def _weighted(table: SliceTable, settings: PruneConfig) -> WeightedRanking | None:
    """The weighted ranking, if asked for; says which hparams keep minitron's."""
    if settings.importance != "weighted":
        return None
    if settings.pad_token_id is not None:
        raise UserError("importance='weighted' takes full sequences, not padded ones (pad_token_id)")
    if runtime.size("tp") > 1:
        raise UserError(
            "importance='weighted' reads whole weights: use --tp 1 (pipeline, expert and data parallel "
            "ranks), or importance='minitron'"
        )
    ranking = WeightedRanking(table)
    others = {a.hparam for key, a in table.axes.items() if key not in ranking.axes and a.hparam != DEPTH}
    if others:
        log.info("weighted ranking: %s are ranked by minitron", ", ".join(sorted(others)))
    return ranking


def _plan(
    table: SliceTable,
    sizes: dict[str, int],
    layers: list[int],
    scores: Scores | None,
    settings: PruneConfig,
    repair: str,
) -> Plan:
    counter = count(table, scores.layer_order() if scores else None)
    kept: dict[str, list] = {}
    if scores is not None and not settings.skip_sorting:
        mine = {
            key: order[:, : int(table.axes[key].width_in(sizes))].tolist()
            for key, order in scores.orders(table).items()
        }
        for part in runtime.gather_objects(mine, "pp"):
            kept.update(part)
    return Plan(
        sizes_before=table.hparams(),
        sizes_after=dict(sizes),
        params_before=int(counter.params({})),
        params_after=int(counter.params(sizes)),
        layers_kept=layers,
        active_before=int(counter.active_params({})),
        active_after=int(counter.active_params(sizes)),
        kept=kept,
        importance=settings.importance,
        repair=repair,
        fingerprint=scores.meta.get("model") if scores else None,
        layer_scores=scores.units[DEPTH].tolist() if scores and DEPTH in scores.units else [],
        calibration=dict(scores.meta) if scores else {},
    )
