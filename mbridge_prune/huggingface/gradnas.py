"""The GradNAS mode: mask, score by gradients, search, sort, cut. Reads like docs/huggingface.md."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mbridge_prune import runtime
from mbridge_prune.dynamic import SliceTable, sort
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.heterogeneous import Choices, Forward, Heterogeneous, choices_of
from mbridge_prune.heterogeneous.run import refuse_wrapped
from mbridge_prune.huggingface.block import FFN, HEADS
from mbridge_prune.huggingface.importance import Loss, squared_gradients
from mbridge_prune.huggingface.pretrained import record
from mbridge_prune.huggingface.prices import losses, prices
from mbridge_prune.huggingface.whole_model import table_of
from mbridge_prune.importance import Scores, load_scores, model_fingerprint, save_scores
from mbridge_prune.plan import Plan

log = logging.getLogger("mbridge_prune")
DIVISORS = {f"{HEADS}_divisor": 1, f"{FFN}_divisor": 64}


def get_gradnas_config(**divisors: int) -> dict[str, int]:
    """Search-space config: the step of the choices.

    Args:
        **divisors: `num_attention_heads_divisor` (1), `ffn_hidden_size_divisor` (64).
    """
    config = dict(DIVISORS)
    for key, step in divisors.items():
        if key not in config:
            raise UserError(f"unknown divisor {key!r}{nearest(key, config)}; known: {', '.join(config)}")
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise UserError(f"{key}={step!r} is not a positive integer")
        config[key] = step
    return config


@dataclass(kw_only=True)
class GradNASConfig:
    """The keys of `prune(config=...)`."""

    data_loader: Iterable[Any] | None = None
    """Batches, read once."""
    loss_func: Loss | None = None
    """f(model output, batch) -> scalar loss, differentiable."""
    collect_func: Callable[[Any], Any] | None = None
    """f(batch) -> the model's input: a dict of named arguments, a tuple, or a tensor."""
    max_iter_data_loader: int | None = None
    """Batches that are read, on every rank; None reads all."""
    checkpoint: str | Path | None = None
    """Scores file: read if it exists (no batch is read), written otherwise."""
    max_width_pruning: float = 0.95
    """The largest share of an axis that may go; one head or step of FFN units stays anyway."""
    axes_to_skip: Sequence[str] = ()
    """Axes that keep their size: keys or patterns, such as "layers.0.*" or "*.num_attention_heads"."""

    def __post_init__(self) -> None:
        for name in ("loss_func", "collect_func"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise UserError(f"{name} is {type(value).__name__}, not callable")
        n = self.max_iter_data_loader
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise UserError(
                f"max_iter_data_loader={n!r} must be an integer of at least 1, or None for all batches"
            )
        share = self.max_width_pruning
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
            raise UserError(f"max_width_pruning={share!r} is no share: give 0 to below 1, such as 0.9")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> GradNASConfig:
        """From a plain dict; an unknown key is refused with the nearest right one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in config:
            if key not in names:
                raise UserError(f"unknown config key {key!r}{nearest(key, names)}; keys: {', '.join(names)}")
        return cls(**config)


def prune(
    model: nn.Module,
    constraints: Mapping[str, Any],
    config: Mapping[str, Any],
    space: Mapping[str, int] | None,
    dummy_input: Any,
) -> tuple[nn.Module, Plan]:
    """The steps, in order. See `mbridge_prune.prune`."""
    settings = GradNASConfig.of(config)
    divisors = get_gradnas_config(**(space or {}))
    refuse_wrapped(model, "gradnas")
    table = table_of(model)
    choices = _choices(table, settings, divisors)
    _require_data(settings)
    run = Heterogeneous("gradnas", table, constraints, Forward.of(dummy_input), choices)

    scores = _scores(table, settings)
    lost = losses(table, scores.units, choices)
    found = run.search(prices(lost, run.costs.of, run.limits))
    orders = scores.orders(table)
    sort(table, orders)
    plan = run.cut(found, orders, config, importance="gradnas", calibration=dict(scores.meta))
    plan.search["loss_added"] = sum(lost[key][size] for key, size in found.sizes.items())
    record(model)
    return model, plan


def _choices(table: SliceTable, settings: GradNASConfig, divisors: Mapping[str, int]) -> Choices:
    steps = {key: divisors[f"{key.rpartition('.')[2]}_divisor"] for key in table.axes}
    most = max(axis.size for axis in table.axes.values())
    return choices_of(
        table, steps, largest_cut=settings.max_width_pruning, at_most=most, skip=settings.axes_to_skip
    )


def _require_data(settings: GradNASConfig) -> None:
    if settings.checkpoint is not None and Path(settings.checkpoint).exists():
        return
    for name in ("data_loader", "loss_func"):
        if getattr(settings, name) is None:
            where = f" ({settings.checkpoint} does not exist)" if settings.checkpoint else ""
            raise UserError(
                f"config of mode gradnas needs {name}{where}: data_loader gives batches, "
                "loss_func(model output, batch) their loss"
            )


def _scores(table: SliceTable, settings: GradNASConfig) -> Scores:
    """Scores from the file if there is one, otherwise from the gradients."""
    path = Path(settings.checkpoint) if settings.checkpoint else None
    expect = {"model": model_fingerprint(table), "ranking": "gradnas"}
    if path is not None and runtime.gather_objects(path.exists())[0]:
        scores = load_scores(path, expect)
        log.info("scores read from %s: no batch is read", path)
        return scores
    assert settings.data_loader is not None and settings.loss_func is not None
    scores = squared_gradients(
        table, settings.data_loader, settings.loss_func, settings.collect_func, settings.max_iter_data_loader
    )
    scores.meta.update(expect)
    if path is not None:
        save_scores(scores, path)
        log.info("scores written to %s", path)
    return scores
