"""Mixture of experts: router, routed experts (one by one or as a grouped GEMM), latent projections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from mbridge_prune.dynamic import (
    Consumer,
    DynamicModule,
    Fixed,
    Follow,
    Layout,
    Modules,
    OneGroup,
    Probe,
    Reading,
    Scope,
    Sizes,
    Slice,
    Stack,
    Tensors,
    Unit,
    Units,
    wraps,
)
from mbridge_prune.errors import UserError
from mbridge_prune.mcore.linear import (
    Leaf,
    follow,
    has_tensor,
    linear_consumer,
    linear_follows,
    linear_slices,
    unit_of,
)
from mbridge_prune.mcore.mlp import expert_input, fc1_layout


@wraps(MoELayer)
class DynamicMoELayer(DynamicModule):
    """The experts' axis of a layer, the axis of their channels, and the counts of the layer.

    Experts are ranked inside their routing group, of which every one keeps the same number; each
    expert's channels are a group of their own. Under expert parallelism the units are global and
    each rank holds a contiguous share.
    """

    def __init__(self, module, scope):
        super().__init__(module, scope)
        config = scope.config
        ranks = module.ep_group if module.ep_group.size() > 1 else None
        self.groups = config.moe_router_num_groups or 1
        self.experts = scope.axis("num_moe_experts", config.num_moe_experts, groups=self.groups, ranks=ranks)
        self.channels = scope.axis(
            "moe_ffn_hidden_size",
            config.num_moe_experts * config.moe_ffn_hidden_size,
            groups=config.num_moe_experts,
            within=self.experts,
            per_group=True,
        )

    def check(self, sizes: Sizes) -> None:
        config, experts = self.scope.config, int(self.experts.size_in(sizes))
        needs, what = config.moe_router_topk, f"moe_router_topk={config.moe_router_topk}"
        if config.moe_router_group_topk:
            # Every group must hold the experts that are taken out of it.
            each = -(-config.moe_router_topk // config.moe_router_group_topk)
            needs = each * self.groups
            what += f" out of {config.moe_router_group_topk} of {self.groups} routing groups"
        if experts < needs:
            raise UserError(f"num_moe_experts={experts} is too few for {what}; smallest choice: {needs}")

    def slices(self) -> Iterator[Slice]:
        for name, out, in_ in self._latent():
            yield from linear_slices(getattr(self.module, name), out, in_)

    def _latent(self) -> Iterator[tuple[str, Layout, Layout]]:
        hidden, latent = Units(self.scope.axes["hidden_size"]), self.scope.config.moe_latent_size
        if latent:
            yield "fc1_latent_proj", Fixed(latent), hidden
            yield "fc2_latent_proj", hidden, Fixed(latent)

    def follows(self) -> Iterator[Follow]:
        module, config = self.module, self.scope.config
        for name, out, in_ in self._latent():
            yield from linear_follows(getattr(module, name), out, in_)
        yield Follow(config, "num_moe_experts", self.experts)
        yield Follow(config, "moe_ffn_hidden_size", OneGroup(self.channels, 0))
        yield Follow(module, "num_local_experts", self.experts, self._share)
        yield Follow(module, "local_expert_indices", self.experts, self._indices)
        # Last: it reads the configuration that the rows above have set.
        yield Follow(module, "token_dispatcher", self.experts, self._dispatcher)

    def _share(self, experts: int) -> int:
        return experts // self.experts.shares

    def _indices(self, experts: int) -> list[int]:
        each = self._share(experts)
        first = 0 if self.experts.ranks is None else self.experts.ranks.rank() * each
        return list(range(first, first + each))

    def _dispatcher(self, experts: int) -> Any:
        """A dispatcher for fewer experts: its index tables are made when it is built."""
        module = self.module
        dispatcher = type(module.token_dispatcher)(
            self._share(experts),
            self._indices(experts),
            config=module.config,
            pg_collection=get_default_pg_collection(),
        )
        if getattr(module, "shared_expert_overlap", False):
            dispatcher.set_shared_experts(module.shared_experts)
        return dispatcher

    def probes(self) -> Iterator[Probe]:
        first = self.experts.local().start
        yield Probe(self.module.experts, "output", f"{self.scope.place}.mlp.experts",
                    (Reading(self.experts),), "routed_norm", first=first,
                    router=self.module.router)  # fmt: skip

    def consumers(self) -> Iterator[Consumer]:
        for name, _, in_ in self._latent():
            if not isinstance(in_, Fixed):
                yield from linear_consumer(getattr(self.module, name), in_, f"{self.scope.place}.mlp.{name}")

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        axes = {
            **self.scope.axes,
            "num_moe_experts": self.experts,
            "moe_ffn_hidden_size": self.channels,
        }
        for name, child in self.module.named_children():
            if not name.endswith("latent_proj"):
                yield child, self.scope.child(name, axes=axes, router=self.module.router)


@wraps(TopKRouter)
class DynamicRouter(Leaf):
    """Weight [experts, hidden], bias, and the buffers that count or shift experts."""

    untouched = ("ga_steps",)

    def slices(self) -> Iterator[Slice]:
        experts = self.scope.axes["num_moe_experts"]
        yield Slice(self.module, "weight", 0, experts)
        yield Slice(self.module, "weight", 1, self.scope.axes["hidden_size"])
        for name in ("bias", "expert_bias", "local_tokens_per_expert", "global_tokens_per_expert"):
            if getattr(self.module, name, None) is not None:
                yield Slice(self.module, name, 0, experts)

    def follows(self) -> Iterator[Follow]:
        yield from follow(self.module, ("num_experts",), self.scope.axes["num_moe_experts"])

    def consumers(self) -> Iterator[Consumer]:
        hidden = self.scope.axes["hidden_size"]
        label = f"{self.scope.place}.mlp.router"
        yield Consumer(self.module, "weight", hidden, label, self.module, "input")


@wraps(SequentialMLP)
class DynamicSequentialExperts(DynamicModule):
    """Experts one by one: each is an MLP of its own."""

    def follows(self) -> Iterator[Follow]:
        experts = self.scope.axes["num_moe_experts"]
        yield Follow(self.module, "num_local_experts", experts, lambda n: n // experts.shares)
        if self.module.config is not self.scope.config:
            yield Follow(self.module.config, "num_moe_experts", experts)
            channels = OneGroup(self.scope.axes["moe_ffn_hidden_size"], 0)
            yield from follow(self.module.config, ("ffn_hidden_size", "moe_ffn_hidden_size"), channels)
            yield from follow(self.module.config, ("hidden_size",), self.scope.axes["hidden_size"])

    def stacks(self) -> Iterator[Stack]:
        yield Modules(self.scope.axes["num_moe_experts"], self.module, "local_experts")

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        axis, active = self.scope.axes["num_moe_experts"], self.scope.config.moe_router_topk
        for number, expert in zip(axis.local(), self.module.local_experts, strict=True):
            unit = Unit(axis, number, "", active)
            yield expert, self.scope.child(f"local_experts.{number - axis.local().start}", unit=unit)


@wraps(TEGroupedMLP)
class DynamicGroupedExperts(Leaf):
    """Experts as a grouped GEMM: `linear_fc1.weight0`, `weight1`, ... hold one expert each."""

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.experts, self.channels = scope.axes["num_moe_experts"], scope.axes["moe_ffn_hidden_size"]
        self.outside = expert_input(scope)

    def _linears(self, group: int) -> Iterator[tuple[str, nn.Module, Layout, Layout]]:
        channels = OneGroup(self.channels, group)
        fc1 = fc1_layout(channels, self.scope.config.gated_linear_unit)
        yield "linear_fc1", self.module.linear_fc1, fc1, self.outside
        yield "linear_fc2", self.module.linear_fc2, self.outside, channels

    def slices(self) -> Iterator[Slice]:
        for place, number in enumerate(self.experts.local()):
            for name, linear, out, in_ in self._linears(number):
                unit = Unit(self.experts, number, name, self.scope.config.moe_router_topk)
                yield Slice(linear, f"weight{place}", 0, out, unit_of(unit, "weight"))
                yield Slice(linear, f"weight{place}", 1, in_, unit_of(unit, "weight"))
                if has_tensor(linear, f"bias{place}"):
                    yield Slice(linear, f"bias{place}", 0, out, unit_of(unit, "bias"))

    def follows(self) -> Iterator[Follow]:
        def share(n: int) -> int:
            return n // self.experts.shares

        yield Follow(self.module, "num_local_experts", self.experts, share)
        yield from follow(self.module, ("input_size",), self.outside)
        for _, linear, out, in_ in self._linears(0):
            yield Follow(linear, "num_gemms", self.experts, share)
            yield from linear_follows(linear, out, in_)

    def stacks(self) -> Iterator[Stack]:
        for linear in (self.module.linear_fc1, self.module.linear_fc2):
            yield Tensors(self.experts, linear, ("weight", "bias"))

    def probes(self) -> Iterator[Probe]:
        yield Probe(self.module.linear_fc2, "input", f"{self.scope.place}.mlp.experts.linear_fc2",
                    (Reading(self.channels),), "routed_magnitude", first=self.experts.local().start,
                    router=self.scope.router)  # fmt: skip

    def consumers(self) -> Iterator[Consumer]:
        for slot, number in enumerate(self.experts.local()):
            unit = Unit(self.experts, number, "", self.scope.config.moe_router_topk)
            for name, linear, _, in_ in self._linears(number):
                if not isinstance(in_, Fixed):
                    label = f"{self.scope.place}.mlp.experts.{number}.{name}"
                    yield Consumer(linear, f"weight{slot}", in_, label, linear, "input", unit=unit, slot=slot,
                                   router=self.scope.router)  # fmt: skip
