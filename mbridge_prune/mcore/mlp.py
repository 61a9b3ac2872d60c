"""The MLP: plain or gated, with and without bias; dense, one expert, or the shared expert."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from mbridge_prune.dynamic import (
    Axis,
    Concat,
    Consumer,
    Fixed,
    Follow,
    Gain,
    Layout,
    OneGroup,
    Probe,
    Reading,
    Scope,
    Slice,
    Unit,
    Units,
    wraps,
)
from mbridge_prune.dynamic.layout import as_layout
from mbridge_prune.mcore.linear import (
    Leaf,
    follow,
    has_fused_norm,
    linear_consumer,
    linear_follows,
    linear_gains,
    linear_slices,
)


def fc1_layout(channels: Layout, gated: bool) -> Layout:
    """Rows of fc1: the FFN channels; gated, those of the gate and then those of the up projection."""
    return Concat(channels, channels) if gated else channels


@wraps(MLP)
class DynamicMLP(Leaf):
    """`linear_fc1` rows: FFN channels (gated: gate then up); `linear_fc2` columns: FFN channels.

    As one expert of a `SequentialMLP` its channels are one group of the layer's
    `moe_ffn_hidden_size`: every expert has an order of its own.
    """

    size_field = "ffn_hidden_size"
    is_shared = False
    """Beside routed experts, to whose output its own is added."""

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.hidden: Axis | Layout = scope.axes["hidden_size"]
        self.unit = scope.unit
        if self.unit is None:
            self.axis = scope.axis(self.size_field, getattr(scope.config, self.size_field))
            self.channels: Layout = Units(self.axis)
        else:
            self.hidden = expert_input(scope)
            self.axis = scope.axes["moe_ffn_hidden_size"]
            self.channels = OneGroup(self.axis, self.unit.number)

    def _fc1(self) -> Layout:
        return fc1_layout(self.channels, self.scope.config.gated_linear_unit)

    def _unit(self, role: str) -> Unit | None:
        return self.unit and Unit(self.unit.axis, self.unit.number, role, self.unit.active)

    def slices(self) -> Iterator[Slice]:
        module = self.module
        yield from linear_slices(module.linear_fc1, self._fc1(), self.hidden, self._unit("linear_fc1"))
        yield from linear_slices(module.linear_fc2, self.hidden, self.channels, self._unit("linear_fc2"))

    def follows(self) -> Iterator[Follow]:
        module = self.module
        yield from linear_follows(module.linear_fc1, self._fc1(), self.hidden)
        yield from linear_follows(module.linear_fc2, self.hidden, self.channels)
        yield from follow(module, ("input_size",), self.hidden)
        if module.config is not self.scope.config:
            # An expert's configuration is mostly a copy in which its size has the dense name.
            yield from follow(module.config, ("ffn_hidden_size",), self.channels)
        yield from follow(module.config, ("hidden_size",), self.scope.axes["hidden_size"])
        if self.unit is None:
            yield Follow(self.scope.config, self.size_field, self.channels)

    def probes(self) -> Iterator[Probe]:
        fc1, fc2, place = self.module.linear_fc1, self.module.linear_fc2, self._place()
        if self.unit is not None:
            reading = Reading(self.axis)
            yield Probe(fc2, "input", f"{place}.linear_fc2", (reading,), "routed_magnitude",
                        first=self.unit.number, router=self.scope.router)  # fmt: skip
            return
        if has_fused_norm(fc1):
            hidden = Reading(self.scope.axes["hidden_size"])
            yield Probe(fc1, "norm_output", f"{place}.linear_fc1", (hidden,))
        yield Probe(fc2, "input", f"{place}.linear_fc2", (Reading(self.axis),), sharded=True)

    def consumers(self) -> Iterator[Consumer]:
        fc1, fc2, place = self.module.linear_fc1, self.module.linear_fc2, self._place()
        if self.unit is None:
            yield from linear_consumer(fc1, self.hidden, f"{place}.linear_fc1")
            yield from linear_consumer(fc2, self.channels, f"{place}.linear_fc2", adds=not self.is_shared)
            return
        for name, linear, in_ in (
            ("linear_fc1", fc1, as_layout(self.hidden)),
            ("linear_fc2", fc2, self.channels),
        ):
            if not isinstance(in_, Fixed):
                label = f"{place}.{self.unit.number}.{name}"
                yield from linear_consumer(linear, in_, label, unit=self.unit, router=self.scope.router)

    def gains(self) -> Iterator[Gain]:
        fc1, fc2, place = self.module.linear_fc1, self.module.linear_fc2, self._place()
        yield from linear_gains(fc1, self.hidden, self._fc1(), self.scope, f"{place}.linear_fc1")
        yield from linear_gains(fc2, self.channels, self.hidden, self.scope, f"{place}.linear_fc2")

    def _place(self) -> str:
        return f"{self.scope.place}.mlp" if self.unit is None else f"{self.scope.place}.mlp.experts"


@wraps(SharedExpertMLP)
class DynamicSharedExpert(DynamicMLP):
    """The expert that every token visits, and its gate [1, hidden]."""

    size_field = "moe_shared_expert_intermediate_size"
    is_shared = True

    def slices(self) -> Iterator[Slice]:
        yield from super().slices()
        if self.module.gate_weight is not None:
            yield Slice(self.module, "gate_weight", 1, self.hidden)

    def follows(self) -> Iterator[Follow]:
        yield from super().follows()
        yield from follow(self.module.config, (self.size_field,), self.channels)

    def consumers(self) -> Iterator[Consumer]:
        yield from super().consumers()
        if self.module.gate_weight is not None:
            label = f"{self._place()}.gate_weight"
            yield Consumer(self.module, "gate_weight", self.hidden, label, self.module, "input")

    def _place(self) -> str:
        return f"{self.scope.place}.mlp.shared_experts"


def expert_input(scope: Scope) -> Layout:
    """What a routed expert reads and writes: the hidden state, or its latent projection."""
    latent = getattr(scope.config, "moe_latent_size", None)
    return Fixed(latent) if latent else Units(scope.axes["hidden_size"])
