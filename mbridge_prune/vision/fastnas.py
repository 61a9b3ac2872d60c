"""The vision mode: trace, choose sizes, sort, measure, search, cut. Reads like docs/vision.md."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from mbridge_prune.dynamic import sort
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import Choices, Drops, Forward, Found, Heterogeneous, choices_of, measure
from mbridge_prune.heterogeneous.run import refuse_wrapped
from mbridge_prune.heterogeneous.sensitivity import number
from mbridge_prune.plan import Plan
from mbridge_prune.report.console import progress_bar
from mbridge_prune.search.callables import identity_of, name_of
from mbridge_prune.search.store import Store
from mbridge_prune.vision.config import FastNASConfig, get_fastnas_config, space_of
from mbridge_prune.vision.ranking import orders
from mbridge_prune.vision.recalibration import Recalibration, batch_norms
from mbridge_prune.vision.table import Traced, table_of

__all__ = ["FastNASConfig", "get_fastnas_config", "profile", "prune"]

log = logging.getLogger("mbridge_prune")


def prune(
    model: nn.Module,
    constraints: Mapping[str, Any],
    config: Mapping[str, Any],
    space: Mapping[str, Any] | None = None,
    dummy_input: Any = None,
) -> tuple[nn.Module, Plan]:
    """The steps, in order. See `mbridge_prune.prune`."""
    settings = FastNASConfig.of(config)
    if settings.data_loader is None and batch_norms(model):
        raise UserError(
            f"{type(model).__name__} has BatchNorm, whose statistics a cut changes: config needs a "
            "data_loader with training batches"
        )
    traced, run = profile(model, constraints, space, dummy_input)
    table = traced.table
    score = Score(settings)
    store = Store(settings.checkpoint, {**run.identity(), "score": identity_of(score)})

    order, per_unit = orders(traced), traced.channels_per_unit()
    with progress_bar("sorting", len(table.entries), "tensors") as step:
        sort(table, order, step)
    full, drops = measure(table, run.choices, score, store)
    found = run.search(drops)
    if settings.verbose:
        tell(traced, run.choices, drops, found)
    plan = run.cut(found, order, dict(config), importance="consumer_weight_norm")
    score.recalibration(model)
    plan.search |= {
        "score": name_of(score), "score_before": full, "score_after": number(score, model, found.sizes),
        "drops": {key: {str(n): drop for n, drop in by_size.items()} for key, by_size in drops.items()},
        "left_alone": traced.alone, "channels_per_unit": per_unit,
    }  # fmt: skip
    log.info("%s: %.6g before, %.6g after", name_of(score), full, plan.search["score_after"])
    return model, plan


def profile(
    model: nn.Module, constraints: Mapping[str, Any], space: Mapping[str, Any] | None, dummy_input: Any
) -> tuple[Traced, Heterogeneous]:
    """Traces the model and prints what its subnets cost; nothing is measured or changed.

    Raises:
        UserError: what cannot be traced, or a budget that cannot be kept.
    """
    wanted = space_of(space or {})
    refuse_wrapped(model, "fastnas")
    forward = Forward.of(dummy_input)
    traced = table_of(model, forward)
    for path, why in traced.alone.items():
        log.info("left alone: %s: %s", path, why)
    choices = choices_of(
        traced.table,
        traced.step(wanted.channel_divisor, wanted.feature_divisor),
        largest_cut=wanted.max_pruning,
        at_most=wanted.sizes_per_axis,
        skip=wanted.axes_to_skip,
    )
    run = Heterogeneous("fastnas", traced.table, constraints, forward, running(traced, forward, choices))
    return traced, run


def running(traced: Traced, forward: Forward, choices: Choices) -> dict[str, list[int]]:
    """The sizes that the network runs with; others go, and are named in `traced.alone`."""
    found = {}
    with progress_bar("trying", sum(len(sizes) - 1 for sizes in choices.values()), "sizes") as step:
        for key, sizes in choices.items():
            failed = {}
            for size in sizes[:-1]:
                if (why := traced.fails(forward, {key: size})) is not None:
                    failed[size] = why
                step(1)
            if failed:
                said = ", ".join(map(str, failed))
                traced.alone[key] = f"the network does not run at {said} units: {next(iter(failed.values()))}"
                log.info("left out: %s: %s", key, traced.alone[key])
            found[key] = [size for size in sizes if size not in failed]
    return found


class Score:
    """The user's score of a model whose BatchNorm has been recalibrated."""

    def __init__(self, settings: FastNASConfig):
        assert settings.score_func is not None
        self.function = settings.score_func
        self.name = name_of(settings.score_func)
        self.recalibration = Recalibration(
            settings.data_loader, settings.collect_func, settings.max_iter_data_loader
        )
        self.fingerprint = {
            "score_func": identity_of(settings.score_func),
            "collect_func": identity_of(settings.collect_func),
            "max_iter_data_loader": settings.max_iter_data_loader,
            "data": self.recalibration.fingerprint(),
        }

    def __call__(self, model: nn.Module) -> float:
        with self.recalibration.around(model):
            return self.function(model)


def tell(traced: Traced, choices: Choices, drops: Drops, found: Found) -> None:
    """Logs every axis: what it loses at each size, and the size that it got."""
    channels = traced.channels_per_unit()
    for key, sizes in choices.items():
        lost = ", ".join(f"{n}: {drops[key][n]:.4g}" for n in sizes[:-1]) or "keeps its size"
        units = f" units of {channels[key]} channels" if channels[key] > 1 else ""
        log.info("%s: %d of %d%s (drop at %s)", key, found.sizes[key], sizes[-1], units, lost)
