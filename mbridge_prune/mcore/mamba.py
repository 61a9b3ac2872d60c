"""Mamba-2: heads in SSM groups, channels inside heads; the hybrid stack and its model."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.core.models.mamba.mamba_model import MambaModel
from megatron.core.ssm.mamba_block import MambaStack
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.ssm.mlp_layer import MLPLayer

from mbridge_prune.dynamic import (
    Concat,
    Consumer,
    Cost,
    Fixed,
    Follow,
    Gain,
    Layout,
    Probe,
    Reading,
    Renorm,
    Slice,
    Units,
    wraps,
)
from mbridge_prune.mcore.gpt import DynamicGPTModel, DynamicTransformerBlock, DynamicTransformerLayer
from mbridge_prune.mcore.linear import (
    Leaf,
    follow,
    has_fused_norm,
    has_tensor,
    linear_consumer,
    linear_follows,
    linear_gains,
    linear_slices,
    norm_follows,
    norm_slices,
)


@wraps(MambaMixer)
class DynamicMambaMixer(Leaf):
    """`in_proj` rows: z, x (the channels, head after head), B, C (an SSM group each), dt (a head each).

    `mamba_num_heads` are ranked inside their SSM group, which shares B and C; `mamba_head_dim`
    inside each head: depthwise convolution, scalar A, dt and D a head, so that any order of a
    head's channels gives the same function.
    """

    def __init__(self, module, scope):
        super().__init__(module, scope)
        self.hidden = scope.axes["hidden_size"]
        self.heads = scope.axis("mamba_num_heads", module.nheads, groups=module.ngroups)
        self.channels = scope.axis(
            "mamba_head_dim",
            module.nheads * module.headdim,
            groups=module.nheads,
            within=self.heads,
            per_group=True,
        )

    def _state(self) -> int:
        """Rows of B (or C): SSM groups times state."""
        return self.module.ngroups * self.module.d_state

    def _in_proj(self) -> Layout:
        x, state = Units(self.channels), Fixed(self._state())
        return Concat(x, x, state, state, Units(self.heads))

    def _conv(self) -> Layout:
        state = Fixed(self._state())
        return Concat(Units(self.channels), state, state)

    def slices(self) -> Iterator[Slice]:
        module, heads, x = self.module, self.heads, Units(self.channels)
        yield from linear_slices(module.in_proj, self._in_proj(), self.hidden)
        yield from linear_slices(module.out_proj, self.hidden, x)
        for name in ("weight", "bias"):
            if has_tensor(module.conv1d, name):
                yield Slice(module.conv1d, name, 0, self._conv())
        yield Slice(module, "A_log", 0, heads)
        yield Slice(module, "dt_bias", 0, heads)
        yield Slice(module, "D", 0, x if module.D_has_hdim else heads)
        yield from norm_slices(getattr(module, "norm", None), x)

    def follows(self) -> Iterator[Follow]:
        module, config, heads, x = self.module, self.scope.config, self.heads, Units(self.channels)
        yield from linear_follows(module.in_proj, self._in_proj(), self.hidden)
        yield from linear_follows(module.out_proj, self.hidden, x)
        yield from follow(module.conv1d, ("in_channels", "out_channels", "groups"), self._conv())
        yield from follow(module, ("d_model",), self.hidden)
        yield from follow(module, ("nheads", "nheads_local_tp"), heads)
        yield from follow(module, ("d_inner", "d_inner_local_tp"), x)
        yield from follow(module.cp, ("nheads_local_tp", "nheads_local_tpcp"), heads)
        yield from follow(module.cp, ("d_inner_local_tp", "d_inner_local_tpcp"), x)
        yield Follow(config, "mamba_num_heads", heads)
        norm = getattr(module, "norm", None)
        if norm is not None:
            yield from norm_follows(norm, x)
            if getattr(norm, "group_size", None) is not None:
                yield Follow(norm, "group_size", x, lambda n: n // module.ngroups)
        # The width of a head: of all channels, those of one of the heads that are left.
        yield Follow(config, "mamba_head_dim", _Width(self.channels))
        yield Follow(module, "headdim", _Width(self.channels))

    def probes(self) -> Iterator[Probe]:
        place, in_proj = f"{self.scope.place}.mixer", self.module.in_proj
        if has_fused_norm(in_proj):
            yield Probe(in_proj, "norm_output", f"{place}.in_proj", (Reading(self.hidden),))
        readings = (Reading(self.heads, self.module.headdim), Reading(self.channels))
        inner = self.module.d_inner_local_tp
        yield Probe(in_proj, "output", f"{place}.x", readings, part=(inner, inner), sharded=True)

    def consumers(self) -> Iterator[Consumer]:
        yield from linear_consumer(self.module.in_proj, self.hidden, f"{self.scope.place}.mixer.in_proj")
        norm, label = getattr(self.module, "norm", None), f"{self.scope.place}.mixer.out_proj"
        renorm = None if norm is None else Renorm(norm, self.module.ngroups, norm.eps)
        yield from linear_consumer(
            self.module.out_proj, Units(self.channels), label, adds=True, renorm=renorm
        )

    def gains(self) -> Iterator[Gain]:
        label = f"{self.scope.place}.mixer.in_proj"
        yield from linear_gains(self.module.in_proj, self.hidden, self._in_proj(), self.scope, label)

    def costs(self) -> Iterator[Cost]:
        m, x = self.module, Units(self.channels)
        yield Cost("cache", self._conv(), m.d_conv)
        yield Cost("cache", x, m.d_state)
        # A channel's state: decay, input times B, and times C (a multiplication and an addition each).
        yield Cost("flops", x, 6 * m.d_state)


class _Width(Units):
    """The units of one group, as a length."""

    def size(self, sizes):
        return self.axis.width_in(sizes)


@wraps(MambaLayer)
class DynamicMambaLayer(DynamicTransformerLayer):
    """A separate norm where it is not fused into the mixer's `in_proj`, and the mixer."""

    norm_names = ("norm",)

    def children(self):
        yield self.module.mixer, self.scope.child("mixer")


@wraps(MLPLayer)
class DynamicMLPLayer(DynamicTransformerLayer):
    """A hybrid stack's MLP layer: a transformer layer without attention."""


@wraps(MambaStack)
class DynamicMambaStack(DynamicTransformerBlock):
    """The hybrid stack: Mamba, attention, MLP and MoE layers in the order of a pattern."""

    norm_name = "final_norm"

    def pattern_owners(self):
        return (self.module,)


@wraps(MambaModel)
class DynamicMambaModel(DynamicGPTModel):
    """MambaModel: embedding, hybrid stack, output layer."""
