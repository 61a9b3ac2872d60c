"""From a network and one input to its slice table: trace, follow the channels, settle, try."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from mbridge_prune.dynamic import Scope, Sizes, SliceTable, select
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.mode import evaluating
from mbridge_prune.heterogeneous.costs import Forward
from mbridge_prune.vision.channels import Channels
from mbridge_prune.vision.flow import Flow
from mbridge_prune.vision.layers import FAMILY
from mbridge_prune.vision.tracing import bind, trace, values_of

log = logging.getLogger("mbridge_prune")


@dataclass
class Traced:
    """What tracing has found.

    Args:
        table: every axis is an hparam of its own.
        channels: what lies where.
        alone: part of the network -> why it keeps its channels.
    """

    table: SliceTable
    channels: Channels
    alone: dict[str, str]

    def step(self, channel_divisor: int, feature_divisor: int) -> dict[str, int]:
        """Axis key -> the step of its units that makes a step of so many channels."""
        found = {}
        for key, axis in self.table.axes.items():
            # The second axis of a layer is called "fc.out_features.2".
            divisor = feature_divisor if "out_features" in key.split(".")[-2:] else channel_divisor
            found[key] = divisor // math.gcd(divisor, self.channels.channels_of(axis))
        return found

    def channels_per_unit(self) -> dict[str, int]:
        """Axis key -> channels that a unit stands for: one, but a place in every group counts them all."""
        return {key: self.channels.channels_of(axis) for key, axis in self.table.axes.items()}

    def fails(self, forward: Forward, sizes: Sizes) -> str | None:
        """Why the network does not run with these sizes; None where it does."""
        with select(self.table, sizes) as model:
            try:
                forward(model)
            except Exception as error:  # the network's own code
                return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None


def table_of(model: nn.Module, forward: Forward) -> Traced:
    """The slice table of a network. Nothing is changed.

    Args:
        forward: one forward; a batch of one is enough, and quickest.

    Raises:
        UserError: the network cannot be traced, does not take the input, or has nothing to prune.
    """
    inputs = bind(model, forward.args, forward.kwargs)
    with evaluating(model), torch.no_grad():
        forward.check(model)
        graph, opaque = trace(model, inputs)
        channels = Channels(model)
        flow = Flow(graph, channels)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        values = (x.to(device) if isinstance(x, torch.Tensor) else x for x in values_of(inputs))
        try:
            flow.run(*values)
        except Exception as error:
            raise UserError(
                f"the graph that torch.fx traces of {type(model).__name__} does not run: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    alone = {path: f"cannot be traced: {why}" for path, why in opaque.items()}
    alone |= {path: why for path, why in flow.alone.items() if path not in opaque}
    alone |= dict.fromkeys(_never_run(graph, model), "this forward never runs it: only what it reads is cut")
    channels.settle()
    traced = Traced(_table(model, channels), channels, alone)
    half = {key: max(1, axis.size // 2) for key, axis in traced.table.axes.items()}
    refused = {k: why for k, n in half.items() if (why := traced.fails(forward, {k: n})) is not None}
    if refused:
        axes = list(channels.axes.values())
        for key in refused:
            _freeze_axis(channels, [axis.key for axis in axes].index(key))
        alone |= {key: f"the network does not run with less of it: {why}" for key, why in refused.items()}
        channels.settle()
        traced = Traced(_table(model, channels), channels, alone)
    if not traced.table.axes:
        why_not = "; ".join(f"{path}: {why}" for path, why in alone.items()) or "it has no hidden channels"
        raise UserError(f"nothing in {type(model).__name__} can be pruned: {why_not}")
    return traced


def _table(model: nn.Module, channels: Channels) -> SliceTable:
    return SliceTable.of(model, Scope(family=FAMILY, config=channels))


def _never_run(graph: fx.GraphModule, model: nn.Module) -> list[str]:
    """Modules with parameters that the graph neither calls nor reads (a head for training alone)."""
    called = [str(n.target) for n in graph.graph.nodes if n.op == "call_module"]
    read = {str(n.target).rpartition(".")[0] for n in graph.graph.nodes if n.op == "get_attr"}
    inside = tuple(f"{path}." for path in called)
    return [
        path
        for path, module in model.named_modules()
        if path and module._parameters and path not in {*called, *read} and not path.startswith(inside)
    ]


def _freeze_axis(channels: Channels, number: int) -> None:
    for row in channels.rows:
        axis_n, _ = channels.units_of(row.ids_n)
        channels.freeze(row.ids_n[axis_n == number])
