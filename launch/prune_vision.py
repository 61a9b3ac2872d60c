"""Prunes a vision network to a budget with FastNAS: python launch/prune_vision.py --help."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mbridge_prune import cli, config, fastnas, prune, runtime
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.score_functions import called, load_function
from mbridge_prune.heterogeneous import command
from mbridge_prune.plan import Plan
from mbridge_prune.search.callables import Named
from mbridge_prune.vision.recalibration import first_of
from mbridge_prune.vision.settings import Settings

log = logging.getLogger("mbridge_prune")


def main(arguments: Sequence[str]) -> int:
    settings, known = config.from_command_line(arguments, Settings)
    budgets = settings.search.budgets()
    if settings.search.score_func is None and not known.dry_run:
        raise UserError("no score: give --prune-score-func module:function, f(model) -> float")
    shape, space = input_shape(settings.model.input_shape), dataclasses.asdict(settings.prune)
    if known.dry_run:
        fastnas.profile(network(settings), budgets, space, torch.zeros(shape))
        log.info("dry run: nothing was measured, nothing was written")
        return 0

    def load() -> command.Job:
        batches = settings.data.loader and named(settings.data.loader)
        keys = {
            "score_func": named(settings.search.score_func),
            "data_loader": called(settings.data.loader, lambda _: batches(), None) if batches else None,
            "collect_func": named(settings.data.collect) if settings.data.collect else first_of,
            "max_iter_data_loader": settings.data.max_iter,
        }

        def cut(model: nn.Module, checkpoint: Path) -> Plan:
            keys["checkpoint"] = checkpoint
            return prune(model, [("fastnas", space)], budgets, torch.zeros(shape), keys)[1]

        return command.Job(network(settings), cut)

    return command.run(settings, load)


def named(name: Any) -> Named:
    """The function "module:function"."""
    if ":" not in str(name):
        raise UserError(f"{name!r} is no function: give module:function")
    function, source = load_function(name)
    return Named(name, source, function)


def network(settings: Settings) -> nn.Module:
    """The full network, with its weights."""
    name = settings.model.factory
    if name is None:
        raise UserError("no network: give --model module:function, which builds it")
    build: Callable[[], Any] = named(name)
    model = called(name, lambda _: build(), nn.Identity())
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returned {type(model).__name__}, expected an nn.Module")
    weights = settings.model.weights
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"--weights {weights}: {' '.join(str(error).split())}") from error
    return model.to(runtime.device()).eval()


def input_shape(text: str | None) -> tuple[int, ...]:
    """1,3,224,224 as a tuple."""
    try:
        shape = tuple(int(n) for n in (text or "").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UserError(f"--input-shape {text or ''} is no shape: give 1,3,224,224")
    return shape


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
