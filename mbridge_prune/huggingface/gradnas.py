"""The GradNAS mode: mask, score by gradients, search, sort, cut. Reads like docs/huggingface.md."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import SliceTable, sort
from mbridge_prune.heterogeneous import Choices, Forward, Heterogeneous, choices_of
from mbridge_prune.heterogeneous.run import refuse_wrapped
from mbridge_prune.huggingface.config import GradNASConfig, Space, get_gradnas_config
from mbridge_prune.huggingface.importance import data_fingerprint, squared_gradients
from mbridge_prune.huggingface.pretrained import record
from mbridge_prune.huggingface.prices import losses, prices
from mbridge_prune.huggingface.whole_model import table_of
from mbridge_prune.importance import Scores, load_scores, model_fingerprint, save_scores
from mbridge_prune.plan import Plan
from mbridge_prune.search.callables import identity_of

log = logging.getLogger("mbridge_prune")
__all__ = ["GradNASConfig", "get_gradnas_config", "profile", "prune"]


def prune(
    model: nn.Module,
    constraints: Mapping[str, Any],
    config: Mapping[str, Any],
    space: Mapping[str, Any] | None,
    dummy_input: Any,
) -> tuple[nn.Module, Plan]:
    """The steps, in order. See `mbridge_prune.prune`."""
    settings = GradNASConfig.of(config)
    choose = Space.of(space or {})
    refuse_wrapped(model, "gradnas")
    settings.require_data()
    table = table_of(model)
    choices = _choices(table, choose)
    run = Heterogeneous("gradnas", table, constraints, Forward.of(dummy_input), choices)

    scores = _scores(table, settings)
    lost = losses(table, scores.units, choices)
    found = run.search(prices(lost, run.costs.of, run.limits), "price", worth=lost)
    if settings.verbose:
        tell(lost, found.sizes)
    orders = scores.orders(table)
    sort(table, orders)
    plan = run.cut(found, orders, config, importance="gradnas", calibration=dict(scores.meta))
    plan.search |= {
        "loss_added": sum(lost[key][size] for key, size in found.sizes.items()),
        "drops": {key: {str(n): by_size[n] for n in some(by_size)} for key, by_size in lost.items()},
    }
    record(model)
    return model, plan


def profile(
    model: nn.Module, constraints: Mapping[str, Any], space: Mapping[str, Any], dummy_input: Any
) -> None:
    """Prints what the smallest, middle and largest candidate cost; refuses what `prune` would refuse."""
    table = table_of(model)
    Heterogeneous("gradnas", table, constraints, Forward.of(dummy_input), _choices(table, Space.of(space)))


def some(sizes: Iterable[int], at_most: int = 8) -> list[int]:
    """Some of the sizes for people to read, spread evenly, the ends among them."""
    ordered = sorted(sizes)
    step = max(1, -(-(len(ordered) - 1) // (at_most - 1)))
    return sorted({*ordered[::-step], ordered[0]})


def tell(lost: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int]) -> None:
    """Logs every axis: the size that it got, and the share of its score that goes."""
    for key, by_size in lost.items():
        log.info("%s: %d of %d (loss added %.4g, of %.4g at %d)", key, sizes[key], max(by_size),
                 by_size[sizes[key]], by_size[min(by_size)], min(by_size))  # fmt: skip


def _choices(table: SliceTable, space: Space) -> Choices:
    """Scores cost nothing a size, so that every multiple of the divisor is one."""
    steps = {key: space.divisor(key.rpartition(".")[2]) for key in table.axes}
    most = max(axis.size for axis in table.axes.values())
    return choices_of(table, steps, largest_cut=space.max_pruning, at_most=most, skip=space.axes_to_skip)


def _scores(table: SliceTable, settings: GradNASConfig) -> Scores:
    """Scores from the file if there is one, otherwise from the gradients."""
    path = Path(settings.checkpoint) if settings.checkpoint else None
    loss = settings.loss_func
    expect = {
        "model": model_fingerprint(table),
        "ranking": "gradnas",
        "loss_func": None if loss is None else json.dumps(identity_of(loss), sort_keys=True),
    }
    if path is not None and runtime.gather_objects(path.exists())[0]:
        if settings.data_loader is not None:
            expect["data"] = data_fingerprint(settings.data_loader)
        scores = load_scores(path, expect)
        log.info("scores read from %s: nothing is scored", path)
        return scores
    assert settings.data_loader is not None and loss is not None
    scores = squared_gradients(
        table, settings.data_loader, loss, settings.collect_func, settings.max_iter_data_loader
    )
    scores.meta.update(expect)
    if path is not None:
        save_scores(scores, path)
        log.info("scores written to %s", path)
    return scores
