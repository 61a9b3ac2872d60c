"""What every block of transformers declares: its heads and its FFN units; the hidden size stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mbridge_prune.dynamic import (
    Axis,
    Cost,
    Fixed,
    Follow,
    Layout,
    Probe,
    Reading,
    Repeat,
    Slice,
    Units,
)
from mbridge_prune.dynamic.module import DynamicModule, Scope
from mbridge_prune.errors import UserError

FAMILY = "huggingface"
HEADS, FFN = "num_attention_heads", "ffn_hidden_size"


@dataclass(frozen=True)
class Part:
    """The units of one kind in a block: some linear layers write them, one reads them.

    Args:
        axis: heads, or FFN units.
        writers: (linear layer, how the units lie along its outputs).
        reader: the linear layer whose inputs they are.
        channels: consecutive inputs of the reader that make up one unit (`head_dim` of a head).
        sizes: (owner, plain attribute, its value for so many units).
    """

    axis: Axis
    writers: tuple[tuple[nn.Module, Layout], ...]
    reader: nn.Module
    channels: int
    sizes: tuple[tuple[Any, str, Callable[[int], Any]], ...] = ()

    @property
    def read(self) -> Layout:
        """The reader's inputs."""
        return Units(self.axis) if self.channels == 1 else Repeat(Units(self.axis), self.channels)


class DynamicBlock(DynamicModule):
    """One transformer block. Subclasses name their parts and what no axis touches.

    Every axis is a dimension of its own: no two blocks need to have the same size.
    """

    heads_in_config = False
    """transformers can express fewer heads in some layers: `pruned_heads` of the configuration."""

    pair_work = 4
    """Operations a channel of a head on each pair of tokens: query times key, weight times value."""

    ffn_in_config: str | None = None
    """The field of the configuration that holds the FFN size of all layers."""

    def __init__(self, module: nn.Module, scope: Scope):
        super().__init__(module, scope)
        foreign = getattr(module, "crossattention", None)
        if foreign is not None:
            raise UserError(
                f"unsupported layer {scope.path}.crossattention: gradnas prunes self-attention and FFN; "
                "models without cross attention work (config.add_cross_attention=False)"
            )
        self.parts = (self.attention(), self.ffn())

    def attention(self) -> Part:
        """The heads."""
        raise NotImplementedError

    def ffn(self) -> Part:
        """The FFN units."""
        raise NotImplementedError

    def axis(self, hparam: str, size: int) -> Axis:
        """An axis that is a dimension of its own: its key is its hparam."""
        key = f"{self.scope.place}.{hparam}"
        return Axis(key, size, key)

    def slices(self) -> Iterator[Slice]:
        for part in self.parts:
            for linear, layout in part.writers:
                yield Slice(linear, "weight", out_dim(linear), layout)
                if linear.bias is not None:
                    yield Slice(linear, "bias", 0, layout)
            reader = part.reader
            yield Slice(reader, "weight", 1 - out_dim(reader), part.read)
            if reader.bias is not None:
                yield Slice(reader, "bias", 0, Fixed(len(reader.bias)))

    def follows(self) -> Iterator[Follow]:
        for part in self.parts:
            for linear, layout in part.writers:
                yield Follow(linear, OUT[is_transposed(linear)], layout)
            yield Follow(part.reader, IN[is_transposed(part.reader)], part.read)
            for owner, name, make in part.sizes:
                yield Follow(owner, name, part.axis, make)

    def probes(self) -> Iterator[Probe]:
        for part in self.parts:
            yield Probe(part.reader, "input", part.axis.key, (Reading(part.axis, part.channels),))

    def costs(self) -> Iterator[Cost]:
        heads = self.parts[0]
        yield Cost("flops", heads.read, self.pair_work, per_token=True, seen=heads.reader)

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        return iter(())


OUT = {False: "out_features", True: "nf"}
IN = {False: "in_features", True: "nx"}


def is_transposed(linear: nn.Module) -> bool:
    """True for GPT-2's Conv1D, a linear layer whose weight is [in, out]."""
    return type(linear).__name__ == "Conv1D"


def out_dim(linear: nn.Module) -> int:
    """The dimension of the weight that runs along the outputs."""
    return 1 if is_transposed(linear) else 0


def plain_heads(axis: Axis, head_dim: int) -> Layout:
    """Heads one after another."""
    return Repeat(Units(axis), head_dim)


def tensors_of(module: nn.Module, *names: str) -> tuple[str, ...]:
    """The names, inside `module`, of every tensor of its submodules `names`; absent ones are skipped."""
    found = []
    for name in names:
        child: Any = module
        for step in name.split("."):
            child = getattr(child, step, None)
        if isinstance(child, nn.Module):
            tensors = [*child.named_parameters(), *child.named_buffers()]
            found += [f"{name}.{tensor}" for tensor, _ in tensors]
    return tuple(found)
