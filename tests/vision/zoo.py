"""Small networks of every shape that tracing has to understand, with the axes that it must find in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    """Submodules by name, and a forward given as a function of them."""

    def __init__(self, forward: Callable, **modules: nn.Module):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(self, x)


@dataclass(frozen=True)
class Case:
    """A network, the shape of its input, and the units of every axis.

    Args:
        axes: key -> units.
        renormed: a norm over the channels that go: fewer channels are normalised otherwise.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axes: dict[str, int]
    renormed: bool = False


IMAGE = (2, 3, 8, 8)


def conv(a: int, b: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


class Residual(nn.Module):
    def __init__(self, inside: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv(inside, out, stride=stride, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Identity() if inside == out else nn.Conv2d(inside, out, 1, stride)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.short(x))


class Excite(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class ExciteLinear(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(x.mean((2, 3))).view(b, c, 1, 1).expand_as(x)


class Dense(nn.Module):
    def __init__(self, inside: int, growth: int, layers: int):
        super().__init__()
        self.convs = nn.ModuleList(conv(inside + n * growth, growth) for n in range(layers))

    def forward(self, x):
        features = [x]
        for layer in self.convs:
            features.append(layer(torch.cat(features, 1)).relu())
        return torch.cat(features, dim=1)


class Shuffle(nn.Module):
    """ShuffleNet's: two groups of channels change places."""

    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)


def halves_exchanged(x: torch.Tensor) -> torch.Tensor:
    """A shuffle that reads its lengths off the tensor: half as many groups as channels, whatever they are."""
    b, c, h, w = x.shape
    return x.view(b, -1, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def groups_exchanged(x: torch.Tensor) -> torch.Tensor:
    """A shuffle of as many groups as there are times four channels."""
    b, c, h, w = x.shape
    return x.view(b, c // 4, c // (c // 4), h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle_attention(x: torch.Tensor) -> torch.Tensor:
    """SA-Net's: the groups go into the batch."""
    b, _, h, w = x.shape
    first, second = x.reshape(b * 4, -1, h, w).chunk(2, 1)
    y = torch.cat([first * first.mean((2, 3), keepdim=True).sigmoid(), second], 1).reshape(b, -1, h, w)
    return y.reshape(b, 2, -1, h, w).permute(0, 2, 1, 3, 4).reshape(b, -1, h, w)


@dataclass
class Output:
    """What a network may return: no tensor, and no container that PyTorch knows."""

    logits: torch.Tensor


def moved(operation: Callable) -> Callable[[], nn.Module]:
    """An operation between two convolutions, after one that can be cut whatever it does."""
    return net(lambda s, x: s.c(operation(s.b(s.a(x)))), a=conv(3, 6), b=conv(6, 8), c=conv(8, 4))


class LayerNorm2d(nn.LayerNorm):
    """ConvNeXt's: over the channels of an image."""

    def forward(self, x):
        return F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(dim, dim, 7, padding=3, groups=dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        y = self.dw(x).permute(0, 2, 3, 1)
        y = self.gamma * self.fc2(F.gelu(self.fc1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class VisionTransformer(nn.Module):
    def __init__(self, dim: int = 16):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, dim))
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, 2)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 24), nn.GELU(), nn.Linear(24, dim)),
        )
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class EncoderLayers(nn.Module):
    """PyTorch's own transformer layers, which run fused while they are evaluated."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.patch, self.layers = nn.Conv2d(3, 16, 4, 4), nn.TransformerEncoder(layer, 1)
        self.hidden, self.head = nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.hidden(self.layers(self.patch(x).flatten(2).transpose(1, 2)).mean(1)).relu())


class Scaled(nn.Linear):
    """A linear layer in name, whose weight multiplies no matrix."""

    def forward(self, x):
        return x * self.weight.mean(0).view(1, -1, 1, 1)


class FrozenNorm(nn.Module):
    """torchvision's FrozenBatchNorm2d: all of it is in buffers."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        w, b, m, v = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (v + 1e-5).rsqrt()
        return x * scale + (b - m * scale)


class Zigzag(nn.Module):
    """Its path depends on the data: torch.fx cannot trace it."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = conv(dim, dim)

    def forward(self, x):
        if x.sum() > 0:
            return self.conv(x)
        return self.conv(-x)


class Twice(nn.Module):
    """One convolution, called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = conv(3, 12), conv(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.shared(self.shared(self.stem(x)).relu())
        return self.head(x.mean((-2, -1)))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 5)
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.head(self.c(self.b(self.a(x)).relu()).amax((2, 3)))


class Autoencoder(nn.Module):
    """Its decoder is the encoder's weight, used as it is."""

    def __init__(self):
        super().__init__()
        self.encoder, self.inside, self.back = nn.Linear(6, 10), nn.Linear(10, 8), nn.Linear(8, 10)

    def forward(self, x):
        x = self.back(self.inside(self.encoder(x)).relu())
        return F.linear(x, self.encoder.weight.t())


class Inherited(nn.Conv2d):
    """A convolution by another name."""


def sequential(*modules: nn.Module) -> Callable[[], nn.Module]:
    """The same network every time it is called."""
    state = modules

    def build() -> nn.Module:
        import copy

        return nn.Sequential(*copy.deepcopy(state))

    return build


def net(forward: Callable, **modules: nn.Module) -> Callable[[], nn.Module]:
    import copy

    return lambda: Net(forward, **copy.deepcopy(modules))


def pooled(self, x):
    return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


A, B = "a.out_channels", "b.out_channels"
flat = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]

CASES: dict[str, Case] = {
    "plain": Case(sequential(conv(3, 8), nn.ReLU(), conv(8, 12), nn.ReLU(), *flat, nn.Linear(12, 5)), IMAGE, {"0.out_channels": 8, "2.out_channels": 12}),
    "mlp": Case(sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 4)), (3, 6), {"0.out_features": 16, "2.out_features": 10}),
    "mlp_3d": Case(sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), (3, 7, 6), {"0.out_features": 16}),
    "batch_norm": Case(sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.BatchNorm2d(6), *flat, nn.Linear(6, 5)), IMAGE, {"0.out_channels": 8, "3.out_channels": 6}),
    "batch_norm_plain": Case(sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(8, 6), *flat), IMAGE, {"0.out_channels": 8}),
    "batch_norm_1d": Case(sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)), (3, 6), {"0.out_features": 16}),
    "sync_batch_norm": Case(sequential(conv(3, 8), nn.SyncBatchNorm(8), nn.ReLU(), conv(8, 6), *flat), IMAGE, {"0.out_channels": 8}),
    "instance_norm": Case(sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True, track_running_stats=True), conv(8, 6), nn.InstanceNorm2d(6), *flat, nn.Linear(6, 2)), IMAGE, {"0.out_channels": 8, "2.out_channels": 6}),
    "instance_norm_unbatched": Case(sequential(conv(3, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 6)), IMAGE[1:], {"0.out_channels": 8}),
    "group_norm": Case(sequential(conv(3, 12), nn.GroupNorm(3, 12), nn.ReLU(), conv(12, 6), *flat), IMAGE, {"0.out_channels": 4}, True),
    "group_norm_one": Case(sequential(conv(3, 12), nn.GroupNorm(1, 12), conv(12, 6), *flat), IMAGE, {"0.out_channels": 12}, True),
    "group_norm_each": Case(sequential(conv(3, 12), nn.GroupNorm(12, 12), conv(12, 6), *flat), IMAGE, {"0.out_channels": 12}),
    "layer_norm": Case(sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 4)), (3, 6), {"0.out_features": 16}, True),
    "layer_norm_image": Case(sequential(conv(3, 8), nn.LayerNorm((8, 8, 8)), conv(8, 6), *flat), IMAGE, {"0.out_channels": 8}, True),
    "layer_norm_bare": Case(sequential(nn.Linear(6, 16), nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 4)), (3, 6), {"0.out_features": 16}, True),
    "layer_norm_function": Case(sequential(conv(3, 8), conv(8, 8), LayerNorm2d(8), conv(8, 6), *flat), IMAGE, {"0.out_channels": 8}),
    "layer_norm_positions": Case(sequential(conv(3, 8), nn.LayerNorm((8, 8)), conv(8, 6), *flat), IMAGE, {"0.out_channels": 8}),
    "frozen_norm": Case(sequential(conv(3, 8), FrozenNorm(8), nn.ReLU(), conv(8, 6), *flat), IMAGE, {"0.out_channels": 8}),
    "spatial_attention_expanded": Case(net(lambda s, x: s.c(s.a(x) * s.b(x).sigmoid().expand_as(s.a(x))), a=conv(3, 8), b=conv(3, 1), c=conv(8, 4)), IMAGE, {A: 8}),
    "rms_norm": Case(sequential(nn.Linear(6, 16), nn.RMSNorm(16), nn.Linear(16, 4)), (3, 6), {"0.out_features": 16}, True),
    "conv_1d": Case(sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 3, 5)), (2, 3, 8), {"0.out_channels": 8, "3.out_channels": 4}),
    "conv_3d": Case(sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.AvgPool3d(2), nn.Conv3d(6, 4, 1), nn.Flatten(), nn.Linear(4 * 8, 5)), (2, 2, 4, 4, 4), {"0.out_channels": 6, "3.out_channels": 4}),
    "conv_unbatched": Case(sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), IMAGE[1:], {"0.out_channels": 8}),
    "transposed": Case(sequential(conv(3, 8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), conv(6, 3)), IMAGE, {"0.out_channels": 8, "2.out_channels": 6}),
    "transposed_1d": Case(sequential(nn.ConvTranspose1d(3, 8, 2), nn.ConvTranspose1d(8, 6, 3, 2), nn.Conv1d(6, 3, 1)), (2, 3, 8), {"0.out_channels": 8, "1.out_channels": 6}),
    "transposed_3d": Case(sequential(nn.ConvTranspose3d(2, 8, 2), nn.ReLU(), nn.ConvTranspose3d(8, 6, 2), nn.Conv3d(6, 3, 1)), (1, 2, 3, 3, 3), {"0.out_channels": 8, "2.out_channels": 6}),
    "transposed_grouped": Case(sequential(conv(3, 8), nn.ConvTranspose2d(8, 12, 2, 2, groups=4), conv(12, 3)), IMAGE, {"0.out_channels": 2, "1.out_channels": 3}),
    "transposed_depthwise": Case(sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=8), conv(8, 3)), IMAGE, {"0.out_channels": 8}),
    "depthwise": Case(sequential(conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 6, 1), *flat), IMAGE, {"0.out_channels": 8}),
    "depthwise_doubled": Case(sequential(conv(3, 6), conv(6, 12, groups=6), nn.ReLU6(), conv(12, 5, 1), *flat), IMAGE, {"0.out_channels": 6}),
    "grouped": Case(sequential(conv(3, 12), conv(12, 8, groups=4), nn.ReLU(), conv(8, 5, 1), *flat), IMAGE, {"0.out_channels": 3, "1.out_channels": 2}),
    "grouped_residual": Case(net(lambda s, x: s.c(s.b(s.a(x)).relu() + s.a(x)).mean((2, 3)), a=conv(3, 12), b=conv(12, 12, groups=3), c=conv(12, 5)), IMAGE, {A: 4}),
    "inverted_residual": Case(net(lambda s, x: s.head(F.adaptive_avg_pool2d(s.stem(x) + s.body(s.stem(x)), 1).flatten(1)), stem=conv(3, 8), body=nn.Sequential(conv(8, 24, 1), nn.BatchNorm2d(24), nn.ReLU6(), conv(24, 24, groups=24), nn.BatchNorm2d(24), nn.ReLU6(), conv(24, 8, 1), nn.BatchNorm2d(8)), head=nn.Linear(8, 5)), IMAGE, {"stem.out_channels": 8, "body.0.out_channels": 24}),
    "residual": Case(sequential(conv(3, 8), Residual(8, 8), Residual(8, 8), *flat, nn.Linear(8, 5)), IMAGE, {"0.out_channels": 8, "1.conv1.out_channels": 8, "2.conv1.out_channels": 8}),
    "residual_wider": Case(sequential(conv(3, 8), Residual(8, 12, 2), Residual(12, 12), *flat, nn.Linear(12, 5)), IMAGE, {"0.out_channels": 8, "1.conv1.out_channels": 12, "1.conv2.out_channels": 12, "2.conv1.out_channels": 12}),
    "residual_in_place": Case(net(lambda s, x: pooled(s, s.b(s.a(x)).relu_().add_(s.a(x))), a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 5)), IMAGE, {A: 8}),
    "residual_to_input": Case(net(lambda s, x: s.b(s.a(x).relu()) + x, a=conv(3, 8), b=conv(8, 3)), IMAGE, {A: 8}),
    "shortcut_padded": Case(net(lambda s, x: pooled(s, s.b(s.a(x)) + F.pad(s.a(x), (0, 0, 0, 0, 2, 2))), a=conv(3, 8), b=conv(8, 12), head=nn.Linear(12, 5)), IMAGE, {A: 8}),
    "concat": Case(net(lambda s, x: pooled(s, s.c(torch.cat([s.a(x), s.b(x)], 1)).relu()), a=conv(3, 8), b=conv(3, 6), c=conv(14, 4), head=nn.Linear(4, 5)), IMAGE, {A: 8, B: 6, "c.out_channels": 4}),
    "concat_input": Case(net(lambda s, x: s.b(torch.cat((x, s.a(x)), dim=1)), a=conv(3, 8), b=conv(11, 4)), IMAGE, {A: 8}),
    "concat_same": Case(net(lambda s, x: s.b(torch.cat([s.a(x), s.a(x).neg()], 1)), a=conv(3, 8), b=conv(16, 4)), IMAGE, {A: 8}),
    "concat_norm": Case(net(lambda s, x: s.c(s.n(torch.cat([s.a(x), s.b(x)], 1))), a=conv(3, 8), b=conv(3, 6), n=nn.BatchNorm2d(14), c=conv(14, 4)), IMAGE, {A: 8, B: 6}),
    "concat_residual": Case(net(lambda s, x: s.d(torch.cat([s.a(x), s.b(x)], 1) + s.c(x)), a=conv(3, 8), b=conv(3, 6), c=conv(3, 14), d=conv(14, 4)), IMAGE, {A: 8, B: 6}),
    "dense": Case(sequential(conv(3, 8), Dense(8, 6, 3), conv(26, 4), *flat), IMAGE, {"0.out_channels": 8, "1.convs.0.out_channels": 6, "1.convs.1.out_channels": 6, "1.convs.2.out_channels": 6}),
    "inception": Case(net(lambda s, x: pooled(s, torch.cat([s.a(x), s.b(x), F.max_pool2d(s.c(x), 3, 1, 1), s.c(x)], 1)), a=conv(3, 4, 1), b=nn.Sequential(conv(3, 6, 1), conv(6, 5)), c=conv(3, 7, 5), head=nn.Linear(23, 5)), IMAGE, {A: 4, "b.0.out_channels": 6, "b.1.out_channels": 5, "c.out_channels": 7}),
    "squeeze_excite": Case(sequential(conv(3, 12), Excite(12, 4), conv(12, 5), *flat), IMAGE, {"0.out_channels": 12, "1.down.out_channels": 4}),
    "squeeze_excite_linear": Case(sequential(conv(3, 12), ExciteLinear(12, 4), conv(12, 5), *flat), IMAGE, {"0.out_channels": 12, "1.fc.0.out_features": 4}),
    "spatial_attention": Case(net(lambda s, x: s.c(s.a(x) * torch.sigmoid(s.b(s.a(x)))), a=conv(3, 8), b=conv(8, 1), c=conv(8, 4)), IMAGE, {A: 8}),
    "gated": Case(net(lambda s, x: s.c(torch.tanh(s.a(x)) * s.b(x).sigmoid()), a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)), IMAGE, {A: 8}),
    "glu": Case(sequential(conv(3, 16), nn.GLU(dim=1), conv(8, 4)), IMAGE, {"0.out_channels": 8}),
    "chunked": Case(net(lambda s, x: s.b(s.a(x).chunk(2, 1)[0] * s.a(x).chunk(2, dim=1)[1]), a=conv(3, 16), b=conv(8, 4)), IMAGE, {A: 8}),
    "chunked_apart": Case(net(lambda s, x: s.b(s.a(x).chunk(2, 1)[0]) + s.c(s.a(x).chunk(2, 1)[1]), a=conv(3, 16), b=conv(8, 4), c=conv(8, 4)), IMAGE, {A: 8}),
    "flatten_positions": Case(sequential(conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 10), nn.ReLU(), nn.Linear(10, 5)), IMAGE, {"0.out_channels": 6, "4.out_features": 10}),
    "flatten_norm": Case(sequential(conv(3, 6), nn.Flatten(), nn.BatchNorm1d(6 * 64), nn.Linear(6 * 64, 5)), IMAGE, {"0.out_channels": 6}),
    "view_flexible": Case(net(lambda s, x: s.b(s.a(x).view(x.size(0), -1)), a=conv(3, 6), b=nn.Linear(6 * 64, 5)), IMAGE, {A: 6}),
    "view_by_number": Case(net(lambda s, x: s.c(s.b(s.a(x)).view(-1, 6 * 64)), a=conv(3, 8), b=conv(8, 6), c=nn.Linear(6 * 64, 5)), IMAGE, {A: 8}),
    "channel_shuffle": Case(sequential(conv(3, 12), Shuffle(), conv(12, 8, groups=2), Shuffle(), conv(8, 4)), IMAGE, {"0.out_channels": 3, "2.out_channels": 4}),
    "shuffle_computed": Case(moved(halves_exchanged), IMAGE, {A: 6}),
    "shuffle_computed_groups": Case(moved(groups_exchanged), IMAGE, {A: 6}),
    "shuffle_attention": Case(moved(shuffle_attention), IMAGE, {A: 6}),
    "roll_dims": Case(moved(lambda x: torch.roll(x, shifts=1, dims=1)), IMAGE, {A: 6}),
    "roll_two": Case(moved(lambda x: x.roll((1, 1), (0, 1))), IMAGE, {A: 6}),
    "roll_flat": Case(moved(lambda x: x.roll(1)), IMAGE, {A: 6}),
    "roll_positions": Case(moved(lambda x: x.roll((1, 1), (2, 3))), IMAGE, {A: 6, B: 8}),
    "flip_dims": Case(moved(lambda x: x.flip([1, 2])), IMAGE, {A: 6}),
    "flip_keyword": Case(moved(lambda x: torch.flip(x, dims=(1,))), IMAGE, {A: 6}),
    "flip_positions": Case(moved(lambda x: x.flip(2, 3)), IMAGE, {A: 6, B: 8}),
    "pixel_shuffle": Case(sequential(conv(3, 24), nn.PixelShuffle(2), conv(6, 3)), IMAGE, {"0.out_channels": 6}),
    "unet": Case(net(lambda s, x: s.out(torch.cat([s.a(x), F.interpolate(s.b(F.avg_pool2d(s.a(x), 2)), scale_factor=2)], 1)), a=conv(3, 8), b=conv(8, 6), out=conv(14, 2)), IMAGE, {A: 8, B: 6}),
    "upsample": Case(sequential(conv(3, 8), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.ReflectionPad2d(1), conv(8, 4)), IMAGE, {"0.out_channels": 8}),
    "prelu": Case(sequential(conv(3, 8), nn.PReLU(8), conv(8, 6), nn.PReLU(), *flat, nn.Linear(6, 4)), IMAGE, {"0.out_channels": 8, "2.out_channels": 6}),
    "shared": Case(Twice, IMAGE, {"stem.out_channels": 12}),
    "tied_weight": Case(Tied, IMAGE, {A: 8}),
    "autoencoder": Case(Autoencoder, (3, 6), {"inside.out_features": 8}),
    "inherited": Case(sequential(Inherited(3, 8, 3), Inherited(8, 6, 3), *flat, nn.Linear(6, 2)), IMAGE, {"0.out_channels": 8, "1.out_channels": 6}),
    "multi_head": Case(net(lambda s, x: torch.cat([s.b(s.a(x)).mean((2, 3)), s.c(s.a(x)).mean((2, 3))], 1), a=conv(3, 8), b=conv(8, 3), c=conv(8, 4)), IMAGE, {A: 8}),
    "convnext": Case(sequential(conv(3, 8), ConvNeXt(8), conv(8, 4)), IMAGE, {"0.out_channels": 8, "1.fc1.out_features": 32}, True),
    "transformer": Case(VisionTransformer, IMAGE, {"mlp.0.out_features": 24}, True),
    "transformer_layers": Case(EncoderLayers, IMAGE, {"hidden.out_features": 24}),
    "linear_in_name": Case(sequential(conv(3, 8), Scaled(8, 1), conv(8, 4)), IMAGE, {"0.out_channels": 8}),
    "softmax_positions": Case(net(lambda s, x: s.b(s.a(x).flatten(2).softmax(-1).mean(2)), a=conv(3, 8), b=nn.Linear(8, 4)), IMAGE, {A: 8}),
    "opaque_between": Case(sequential(conv(3, 8), conv(8, 6), Zigzag(6), conv(6, 8), conv(8, 4)), IMAGE, {"0.out_channels": 8, "3.out_channels": 8}),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network of a case, in evaluation mode, with norms that do something, and an input."""
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.dim() == 1 and tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return model, torch.randn(case.shape, generator=random)
