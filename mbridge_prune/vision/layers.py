"""The dynamic modules of plain PyTorch layers: how channels pass through, and which tensors carry them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mbridge_prune.dynamic import DynamicModule, Follow, Slice, registered, wraps
from mbridge_prune.vision.channels import Channels

FAMILY = "vision"


@wraps(nn.Module, family=FAMILY)
class VisionModule(DynamicModule):
    """Any module: its rows are what tracing has found. A class with a rule of its own says `flow`."""

    @property
    def channels(self) -> Channels:
        return self.scope.config

    @property
    def untouched(self) -> tuple[str, ...]:  # type: ignore[override]
        """Every own tensor: those with rows have been taken before."""
        return tuple([*self.module._parameters, *self.module._buffers])

    def slices(self) -> Iterator[Slice]:
        for row in self.channels.rows_of(self.module):
            yield Slice(self.module, row.name, row.dim, self.channels.layout(row.ids_n))

    def follows(self) -> Iterator[Follow]:
        for attribute in self.channels.attributes:
            if attribute.module is self.module:
                layout = self.channels.layout(attribute.ids_n)
                if any(layout.axes()):
                    yield Follow(self.module, attribute.name, layout, attribute.make)


class Layer(VisionModule):
    """A layer with a rule."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """Channels of the output of one call; None where they cannot be told, and have to stay.

        Args:
            ids: numbers of the input's channels, in the shape of the input.
            shape: of the output.
        """
        raise NotImplementedError


def rule_of(module: nn.Module) -> type[Layer] | None:
    """The rule of a module: that of the class whose forward it runs, if its weight is a plain parameter."""
    # A weight that is made in each forward: weight norm, spectral norm. (Not asked by getattr, which torch.fx
    # records while it traces.)
    if "parametrizations" in module._modules or "weight" in vars(module):
        return None
    for cls in type(module).__mro__:
        found = registered(cls, FAMILY)
        if found is not None and issubclass(found, Layer):
            return found
        if "forward" in vars(cls):
            break
    return None


@wraps(nn.Linear, family=FAMILY)
class DynamicLinear(Layer):
    """weight [out, in], bias [out]; the last dimension of the input is read."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        linear, channels = self.module, self.channels
        read, out = channels.along(ids, -1), channels.dimension(linear, "weight", 0)
        channels.unify(channels.dimension(linear, "weight", 1, reads=True), read)
        channels.same(linear, ("bias",), out)
        channels.counts(linear, "out_features", out)
        channels.counts(linear, "in_features", read)
        return out.expand(shape)


class Convolution(Layer):
    """What plain and transposed convolutions share: the channel dimension, the counts, the bias."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        conv, channels = self.module, self.channels
        dim = ids.dim() - len(conv.kernel_size) - 1  # type: ignore[arg-type]
        read = channels.along(ids, dim)
        out = self._out(read)
        channels.same(conv, ("bias",), out)
        channels.counts(conv, "out_channels", out)
        channels.counts(conv, "in_channels", read)
        if self._depthwise():
            channels.counts(conv, "groups", read)
        return _spread(out, dim, shape)

    def _depthwise(self) -> bool:
        return self.module.groups == self.module.in_channels and self.module.groups > 1  # type: ignore[operator]

    def _groups(self, ids_n: torch.Tensor) -> torch.Tensor:
        """The channels of one group: those at the same place of every group go together."""
        return self.channels.tie(ids_n.view(self.module.groups, -1), 0)  # type: ignore[arg-type]

    def _out(self, read: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@wraps(nn.Conv1d, nn.Conv2d, nn.Conv3d, family=FAMILY)
class DynamicConv(Convolution):
    """weight [out, in / groups, ...]. In a depthwise convolution, channels and groups go together."""

    def _out(self, read: torch.Tensor) -> torch.Tensor:
        conv, channels = self.module, self.channels
        out = channels.dimension(conv, "weight", 0)
        if self._depthwise():
            channels.unify(out, read.repeat_interleave(len(out) // len(read)))
            return out
        channels.unify(channels.dimension(conv, "weight", 1, reads=True), self._groups(read))
        self._groups(out)
        return out


@wraps(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, family=FAMILY)
class DynamicConvTranspose(Convolution):
    """weight [in, out / groups, ...]."""

    def _out(self, read: torch.Tensor) -> torch.Tensor:
        conv, channels = self.module, self.channels
        channels.unify(channels.dimension(conv, "weight", 0, reads=not self._depthwise()), read)
        if self._depthwise():
            return read.repeat_interleave(conv.out_channels // len(read))  # type: ignore[operator]
        self._groups(read)
        return channels.dimension(conv, "weight", 1).repeat(conv.groups)  # type: ignore[arg-type]


@wraps(
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    family=FAMILY,
)  # fmt: skip
class DynamicChannelNorm(Layer):
    """Each channel by itself: gain, bias and running statistics [channels]."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        instance = isinstance(self.module, nn.modules.instancenorm._InstanceNorm)
        dim = -self.module._get_no_batch_dim() if instance else 1  # type: ignore[operator]
        channel = self.channels.along(ids, dim)
        self.channels.same(self.module, ("weight", "bias", "running_mean", "running_var"), channel)
        self.channels.counts(self.module, "num_features", channel)
        return ids


@wraps(nn.GroupNorm, family=FAMILY)
class DynamicGroupNorm(Layer):
    """Every group keeps the same places, so that it normalises what is left of what it did."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        norm, channels = self.module, self.channels
        channel = channels.along(ids, 1)
        if norm.num_groups == norm.num_channels:
            channels.counts(norm, "num_groups", channel)
        else:
            channels.tie(channel.view(norm.num_groups, -1), 0)  # type: ignore[arg-type]
        channels.same(norm, ("weight", "bias"), channel)
        channels.counts(norm, "num_channels", channel)
        return ids


@wraps(nn.LayerNorm, nn.RMSNorm, family=FAMILY)
class DynamicLayerNorm(Layer):
    """gain and bias in the shape that is normalised, along at most one dimension of which channels lie."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        norm, channels = self.module, self.channels
        normalised: tuple[int, ...] = tuple(norm.normalized_shape)  # type: ignore[arg-type]
        n = len(normalised)
        varying = [dim for dim in range(n) if channels.varies(ids, dim - n)]
        if not varying:
            return ids
        if len(varying) > 1:
            return None
        place = varying[0]
        channel = channels.along(ids, place - n)
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                channels.unify(channels.dimension(norm, name, place), channel)
        before, after = normalised[:place], normalised[place + 1 :]
        channels.counts(norm, "normalized_shape", channel, lambda size: (*before, size, *after))
        return ids


@wraps(nn.PReLU, family=FAMILY)
class DynamicPReLU(Layer):
    """One slope, or one a channel."""

    def flow(self, ids: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if self.module.num_parameters > 1:  # type: ignore[operator]
            channel = self.channels.along(ids, 1)
            self.channels.same(self.module, ("weight",), channel)
            self.channels.counts(self.module, "num_parameters", channel)
        return ids


def _spread(ids_n: torch.Tensor, dim: int, shape: torch.Size) -> torch.Tensor:
    """[shape] the same channels along `dim` at every other place."""
    return ids_n.view([-1 if place == dim else 1 for place in range(len(shape))]).expand(shape)
