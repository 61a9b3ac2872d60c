"""prune(), score() and restore(): look the mode up and run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mbridge_prune import mcore_minitron
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.heterogeneous import saved
from mbridge_prune.huggingface import gradnas, pretrained
from mbridge_prune.importance import Scores
from mbridge_prune.plan import Plan
from mbridge_prune.vision import fastnas


def _minitron(
    model: nn.Module, constraints: Mapping[str, Any], config: Mapping[str, Any], space: Any, dummy_input: Any
) -> tuple[nn.Module, Plan]:
    del dummy_input
    return mcore_minitron.prune(model, constraints, config, space)


MODES = {"mcore_minitron": _minitron, "fastnas": fastnas.prune, "gradnas": gradnas.prune}
"""Mode -> f(model, constraints, config, search-space config or None, dummy input)."""


def prune(
    model: nn.Module,
    mode: str | list[str | tuple[str, Mapping[str, Any]]],
    constraints: Mapping[str, Any],
    dummy_input: Any = None,
    config: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Plan]:
    """Prunes `model` in place to the constraints.

    Args:
        model: the unwrapped model of this rank (every rank calls this with its own part; of fastnas, with
            the whole model).
        mode: "mcore_minitron", "fastnas" or "gradnas", or [(mode, search-space config)].
        constraints: {"export_config": {hparam: size}}, or upper bounds of a search: "params",
            "active_params", "memory_mb", "flops" (a token), each a number or a share ("70%"). Of fastnas and
            gradnas: "flops" (a forward of `dummy_input`), "params", "latency_ms".
        dummy_input: of fastnas and gradnas, what the model runs on: a tensor, a tuple of arguments, or a
            dict of named ones; not used by mcore_minitron.
        config: see `mbridge_prune.prune_config.PruneConfig`, `mbridge_prune.vision.config.FastNASConfig` and
            `mbridge_prune.huggingface.config.GradNASConfig` for its keys.

    Returns:
        The pruned model (the same object) and the plan of what was cut.

    Raises:
        UserError: any wrong input, before anything was cut. Where a function of yours fails while
            candidates are scored, units have been sorted: the model computes what it did, with its weights in
            another order.
    """
    entries = [mode] if isinstance(mode, (str, tuple)) else list(mode)
    if len(entries) != 1:
        raise UserError(f"mode names {len(entries)} modes; prune takes exactly one")
    name, space = entries[0] if isinstance(entries[0], tuple) else (entries[0], None)
    if name not in MODES:
        raise UserError(f"unknown mode {name!r}{nearest(name, MODES)}; modes: {', '.join(MODES)}")
    return MODES[name](model, constraints, dict(config or {}), space, dummy_input)


def score(model: nn.Module, config: Mapping[str, Any]) -> Scores:
    """Measures importances and cuts nothing: also under tensor parallelism.

    Args:
        model: the unwrapped model of this rank (every rank calls this with its own part).
        config: as for `prune`; with `checkpoint` the scores are written there, for a later prune
            at any parallel layout.

    Returns:
        The scores of the whole model, equal on every rank.

    Raises:
        UserError: any wrong input.
    """
    return mcore_minitron.score_model(model, dict(config))


def restore(model: nn.Module, path: str | Path) -> nn.Module:
    """Gives a freshly built model the pruned shapes and weights of a file that `save` wrote.

    Of a transformers model the configuration follows, too. See `mbridge_prune.heterogeneous.saved.restore`.
    """
    saved.restore(model, path)
    if saved.modes_of(model)[-1] == "gradnas":
        pretrained.record(model)
    return model
