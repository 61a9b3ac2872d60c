"""Follows channels through the graph of a network, operation by operation.

The graph is run once on `dummy_input`. Beside every tensor goes a tensor of its shape that holds the number
of the channel that each element belongs to (`channels.py`). What moves elements is run on the numbers
as well; what computes with them has one of a few rules; what has none keeps all its channels, and is
named.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from mbridge_prune.dynamic import Scope
from mbridge_prune.vision import operations as ops
from mbridge_prune.vision.channels import FROZEN, Channels
from mbridge_prune.vision.layers import FAMILY, rule_of

Ids: TypeAlias = torch.Tensor
PLAIN = (
    torch.Tensor, int, float, complex, str, slice, type(None), type(...), torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Values that hold no tensor but themselves."""


class Flow(fx.Interpreter):
    """Runs a graph and says to `channels` what it finds.

    Attributes:
        alone: operation -> why its channels stay.
    """

    def __init__(self, graph: fx.GraphModule, channels: Channels):
        super().__init__(graph)
        self.channels = channels
        self.ids: dict[fx.Node, Any] = {}
        self.alone: dict[str, str] = {}
        self._narrow: dict[fx.Node, Ids] = {}
        self._constant: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            try:
                ids = self._follow(n, value)
            except Exception as error:  # an argument, or a use of the operation, that its rule does not know
                ids = self._keep(n, value, f"its rule does not fit: {' '.join(str(error).split())}")
            if _shapes(ids) != _shapes(value):
                ids = self._keep(n, value, "its output has another shape than its rule says")
            self.ids[n] = ids
        if not all(isinstance(leaf, PLAIN) for leaf in tree_leaves(value)):
            # An object (a dataclass) takes its tensors out of sight.
            self._keep(n, value, f"it makes a {type(value).__name__}, which is not followed")
        for used in self.user_to_last_uses.get(n, []):
            self.ids.pop(used, None)
            self._narrow.pop(used, None)
        return value

    def _follow(self, n: fx.Node, value: Any) -> Any:
        if n.op == "placeholder":
            return _fixed(value)
        if n.op == "get_attr":
            path, _, name = str(n.target).rpartition(".")
            # The network's own module: the graph has copies of those that hold plain tensors.
            owner = next((m for m, known in self.channels.paths.items() if known == path), None)
            if owner is not None and name in {**owner._parameters, **owner._buffers}:
                if value.dim() > 0 and value.is_floating_point() and value.numel() <= ops.LARGEST:
                    return self.channels.tensor(owner, name)
            self._constant.add(n)
            return _fixed(value)
        if n.op == "output":
            for ids in self._inputs(n):
                self.channels.freeze(ids)
            return _fixed(value)
        if n.op == "call_module":
            return self._module(n, value)
        name, moves = ops.name_of(n)
        rule = self._rule(name)
        return rule(n, value, moves) if rule is not None else self._keep(n, value, "no rule for it")

    def _module(self, n: fx.Node, value: Any) -> Any:
        module = self.module.get_submodule(str(n.target))
        inputs = list(self._inputs(n))
        rule = rule_of(module)
        if rule is not None and len(inputs) == 1:
            scope = Scope(str(n.target), config=self.channels, family=FAMILY)
            ids = rule(module, scope).flow(inputs[0], value.shape)
            return self._keep(n, value, "it mixes channels of several dimensions") if ids is None else ids
        name = (
            ops.MODULES.get(type(module).__name__) if type(module).__module__.startswith("torch.") else None
        )
        known = None if name is None else self._rule(name)
        if known is None or len(inputs) != 1:
            return self._keep(n, value, f"no rule for {type(module).__name__}")
        return known(n, value, module)

    def _rule(self, name: str) -> Callable[[fx.Node, Any, Any], Any] | None:
        for names, rule in (
            (ops.ELEMENTWISE, self._elementwise),
            (ops.PASSED, self._passed),
            (ops.MOVED, self._moved),
            (ops.RESHAPED, self._reshaped),
            (ops.SPLIT, self._split),
            (ops.REDUCED, self._reduced),
            (ops.ALONG, self._along),
        ):
            if name in names:
                return rule
        if re.fullmatch(ops.SPATIAL, name):
            return self._spatial
        return {
            "getitem": self._item,
            "pad": self._padded,
            "glu": self._gated,
            "getattr": self._attribute,
        }.get(name)

    # What computes.

    def _elementwise(self, n: fx.Node, value: Any, _: Any) -> Any:
        found, open_ = None, any(self._open(ids) for ids in self._inputs(n))
        for ids in self._inputs(n, narrow=True):
            found = ids if found is None else self._met(found, ids)
        assert found is not None
        if open_ and not self._open(found) and not self._constant.isdisjoint(n.all_input_nodes):
            self._note(n, "it meets a tensor of a fixed length, or one too large to follow")
        return found.expand(value.shape)

    def _open(self, ids: Ids) -> bool:
        return bool((self.channels.find(ids) != FROZEN).any())

    def _met(self, a: Ids, b: Ids) -> Ids:
        """Channels of an elementwise operation of two tensors, which are broadcast to one shape."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        wide_a, wide_b = a.expand(shape), b.expand(shape)
        stretched_a, stretched_b = self._stretched(a, wide_b), self._stretched(b, wide_a)
        # What is stretched over different channels is the same for all of them: it holds none of them.
        if stretched_a:
            self.channels.freeze(a)
        if stretched_b:
            self.channels.freeze(b)
        if stretched_a and stretched_b:
            return torch.zeros_like(wide_a)
        if not stretched_a and not stretched_b:
            self.channels.unify(wide_a, wide_b)
        return wide_b if stretched_a else wide_a

    def _stretched(self, ids: Ids, other: Ids) -> bool:
        missing = other.dim() - ids.dim()
        return any(
            other.shape[dim] > 1 and (dim < missing or ids.shape[dim - missing] == 1)
            and self.channels.varies(other, dim)
            for dim in range(other.dim())
        )  # fmt: skip

    def _passed(self, n: fx.Node, value: Any, _: Any) -> Any:
        return next(self._inputs(n)).expand(value.shape)

    def _reduced(self, n: fx.Node, value: Any, _: Any) -> Any:
        ids, dims = next(self._inputs(n)), ops.dims_of(n)
        if len(list(self._inputs(n))) > 1:
            return self._keep(n, value, "it compares two tensors")
        dims = list(range(ids.dim())) if dims is None else [d % ids.dim() for d in dims]
        for dim in dims:
            if self.channels.varies(ids, dim):
                return self._keep(n, value, "it mixes channels")
        for dim in dims:
            ids = ids.narrow(dim, 0, 1)
        of = lambda x: ids.reshape(x.shape) if isinstance(x, torch.Tensor) else None
        return tree_map(of, value)

    def _along(self, n: fx.Node, value: Any, module: Any) -> Any:
        """Normalises along one dimension: fine where no channels lie along it."""
        ids = next(self._inputs(n))
        dim = getattr(module, "dim", None)
        dims = ops.dims_of(n) or ([] if dim is None else [dim])
        if not dims or any(self.channels.varies(ids, dim) for dim in dims):
            return self._keep(n, value, "it mixes channels")
        return ids

    def _spatial(self, n: fx.Node, value: Any, _: Any) -> Any:
        """Pooling, resizing: the channels are those of the input, at other positions."""
        ids = next(self._inputs(n))
        positions = ops.positions(n, value, self.fetch_module(n))
        for dim in range(ids.dim() - positions, ids.dim()):
            self.channels.tie(ids, dim)
            ids = ids.narrow(dim, 0, 1)
        of = lambda x: ids.expand(x.shape) if isinstance(x, torch.Tensor) else None
        return tree_map(of, value)

    def _padded(self, n: fx.Node, value: Any, _: Any) -> Any:
        ids = next(self._inputs(n))
        widths = self._told(n.args[1] if len(n.args) > 1 else n.kwargs["pad"])
        last = ids.dim() - len(widths) // 2
        if any(self.channels.varies(ids, dim) for dim in range(last, ids.dim())):
            # Constant channels are put beside the others: their number is written into the network.
            return torch.nn.functional.pad(ids, list(widths)) if _constant(n) else self._keep(
                n, value, "it repeats channels"
            )  # fmt: skip
        return self._spatial_pad(ids, last, value)

    def _spatial_pad(self, ids: Ids, last: int, value: Any) -> Any:
        for dim in range(last, ids.dim()):
            ids = ids.narrow(dim, 0, 1)
        return ids.expand(value.shape)

    def _gated(self, n: fx.Node, value: Any, module: Any) -> Any:
        ids = next(self._inputs(n))
        dim = getattr(module, "dim", None) or next(iter(ops.dims_of(n) or [-1]))
        first, second = ids.chunk(2, dim)
        self.channels.unify(first, second)
        return first

    # What moves elements: it is run on the numbers as well.

    def _moved(self, n: fx.Node, value: Any, moves: Callable[..., Any]) -> Any:
        return moves(*self._with_ids(n.args), **self._with_ids(n.kwargs))

    def _reshaped(self, n: fx.Node, value: Any, moves: Callable[..., Any]) -> Any:
        """A length that is written into the network as a number must not depend on what is pruned."""
        ids = self._moved(n, value, moves)
        if ops.name_of(n)[0] in ops.STRETCHED:
            self._narrow[n] = _unstretched(ids, next(self._inputs(n)).shape)
        written = ops.written(n, value)
        varying = [dim for dim in range(ids.dim()) if self.channels.varies(ids, dim)]
        if len(set(varying) - written) > 1:
            # Which of the lengths changes with the channels, and by how much, is up to the network's code.
            if self.channels.freeze(ids):
                self._note(n, "it divides channels by a computed length")
            return ids
        for dim in written & set(varying):
            if set(varying) - written:
                self.channels.tie(ids, dim)
            elif self.channels.freeze(ids):
                self._note(n, f"it has the length {value.shape[dim]} as a number")
        return ids

    def _attribute(self, n: fx.Node, value: Any, moves: Any) -> Any:
        ids, name = next(self._inputs(n)), n.args[1]
        if name in ("T", "mT"):
            return getattr(ids, str(name))
        return ids if name == "data" else self._keep(n, value, f"no rule for .{name}")

    def _split(self, n: fx.Node, value: Any, moves: Callable[..., Any]) -> Any:
        ids, dims = next(self._inputs(n)), ops.split_dims(n)
        if not any(self.channels.varies(ids, dim) for dim in (range(ids.dim()) if dims is None else dims)):
            return self._moved(n, value, moves)
        parts = self._moved(n, value, moves)
        if ops.name_of(n)[0] != "chunk" or len({part.shape for part in parts}) > 1:
            return self._keep(n, value, "it splits channels at a number")
        for part in parts[1:]:
            self.channels.unify(parts[0], part)
        return parts

    def _item(self, n: fx.Node, value: Any, _: Any) -> Any:
        source = n.args[0]
        ids = self.ids.get(source) if isinstance(source, fx.Node) else None
        index = self._told(n.args[1])
        if not isinstance(ids, torch.Tensor):
            return None if ids is None else ids[index]
        if any(isinstance(i, torch.Tensor) for i in tree_leaves(index)):
            return self._keep(n, value, "it picks elements by a tensor")
        for dim in ops.indexed(index, ids.dim()):
            if self.channels.varies(ids, dim):
                return self._keep(n, value, "it picks channels by number")
        return ids[index]

    # What has no rule.

    def _keep(self, n: fx.Node, value: Any, why: str) -> Any:
        module = self.fetch_module(n)
        own = [] if module is None else [row.ids_n for row in self.channels.rows_of(module)]
        if any([self.channels.freeze(ids) for ids in [*self._inputs(n), *own]]):
            self._note(n, why)
        return _fixed(value)

    def _note(self, n: fx.Node, why: str) -> None:
        stack = n.meta.get("nn_module_stack") or {}
        inside = next(reversed([path for path, _ in stack.values()]), "") if stack else ""
        what = str(n.target) if n.op == "call_module" else ops.name_of(n)[0]
        place = what if n.op == "call_module" or not inside else f"{inside}: {what}"
        self.alone.setdefault(place, why)

    # The arguments of a node.

    def fetch_module(self, n: fx.Node) -> nn.Module | None:
        """The module that a node calls."""
        return self.module.get_submodule(str(n.target)) if n.op == "call_module" else None

    def _inputs(self, n: fx.Node, narrow: bool = False) -> Iterator[Ids]:
        """The numbers of every tensor among the arguments; `narrow`: with length 1 where one was expanded."""
        for argument in itertools.chain(tree_leaves(n.args), tree_leaves(n.kwargs)):
            if isinstance(argument, fx.Node) and argument in self.ids:
                known = self._narrow.get(argument) if narrow else None
                for leaf in tree_leaves(self.ids[argument] if known is None else known):
                    if isinstance(leaf, torch.Tensor):
                        yield leaf

    def _with_ids(self, arguments: Any) -> Any:
        """Arguments with numbers in the place of tensors, and other values as they were computed."""
        return fx.node.map_arg(arguments, lambda node: self.ids.get(node, self.env.get(node)))

    def _told(self, arguments: Any) -> Any:
        return fx.node.map_arg(arguments, lambda node: self.env.get(node))


def _fixed(value: Any) -> Any:
    """Zeros in the shapes of a value's tensors: channels that stay."""
    of = lambda x: torch.zeros(x.shape, dtype=torch.int64) if isinstance(x, torch.Tensor) else None
    return tree_map(of, value)


def _unstretched(ids: Ids, before: torch.Size) -> Ids:
    """An expanded tensor with length 1 along the dimensions that were not there, or had length 1."""
    missing = ids.dim() - len(before)
    for dim in range(ids.dim()):
        if dim < missing or before[dim - missing] == 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def _shapes(value: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _constant(n: fx.Node) -> bool:
    mode = n.args[2] if len(n.args) > 2 else n.kwargs.get("mode", "constant")
    value = n.args[3] if len(n.args) > 3 else n.kwargs.get("value")
    return mode == "constant" and value in (None, 0, 0.0)
