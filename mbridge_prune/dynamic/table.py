"""The slice table of a whole (local) model: every tensor, and the layout of each of its dimensions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from mbridge_prune.dynamic.axis import Axis, Sizes
from mbridge_prune.dynamic.layout import Fixed, Kept, Layout
from mbridge_prune.dynamic.module import DynamicModule, Scope, wrap_tree
from mbridge_prune.dynamic.slices import Consumer, Cost, Follow, Gain, Probe, Unit
from mbridge_prune.dynamic.stack import Layers, Stack
from mbridge_prune.errors import UserError, nearest

DEPTH = "num_layers"


@dataclass
class Entry:
    """One parameter or buffer and the layout of each of its dimensions.

    Args:
        name: name in the local model.
        module, attribute: where the tensor hangs.
        dims: one layout a dimension (`Fixed` where nothing follows an axis).
        layer: global layer number from 0, or None outside layers.
        counted: False for buffers and for a further copy of a tied weight.
        unit: the unit (an expert) that the tensor exists with, or None.
    """

    name: str
    module: nn.Module
    attribute: str
    dims: list[Layout]
    layer: int | None
    counted: bool
    unit: Unit | None = None

    def tensor(self) -> torch.Tensor:
        return getattr(self.module, self.attribute)


@dataclass
class SliceTable:
    """Every tensor, attribute and probe of the local model that follows an axis.

    Build it with `SliceTable.of(model, scope)`. On a pipeline rank it holds the local layers only;
    the keys of axes are global.

    Attributes:
        follows, stacks: (global layer number, what changes with sizes besides the tensors).
        costs: (global layer number, what it keeps or computes besides its weights).
        consumers, gains: (global layer number, the weights and norms that a repair may mend).
        elsewhere: the axes that only other pipeline stages hold, by their key.
    """

    model: nn.Module
    entries: list[Entry]
    follows: list[tuple[int | None, Follow]]
    probes: list[Probe]
    axes: dict[str, Axis] = field(default_factory=dict)
    layers: Layers | None = None
    stacks: list[tuple[int | None, Stack]] = field(default_factory=list)
    checks: list[Callable[[Sizes], None]] = field(default_factory=list)
    costs: list[tuple[int | None, Cost]] = field(default_factory=list)
    consumers: list[tuple[int | None, Consumer]] = field(default_factory=list)
    gains: list[tuple[int | None, Gain]] = field(default_factory=list)
    elsewhere: dict[str, Axis] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, scope: Scope) -> SliceTable:
        """Wraps `model` and reads every wrapper's rows.

        Raises:
            UserError: a layer without a wrapper, or a tensor no row and no `untouched` covers.
        """
        return cls.made_of(model, list(wrap_tree(model, scope)), scope.shards)

    @classmethod
    def made_of(cls, model: nn.Module, wrappers: list[DynamicModule], shards: int = 1) -> SliceTable:
        """Reads the rows of wrappers that were chosen otherwise than by their place in the tree.

        Raises:
            UserError: a tensor no row and no `untouched` covers.
        """
        table = cls(model, _entries(model, wrappers, shards), [], [])
        for wrapper in wrappers:
            table.follows += [(wrapper.scope.layer, follow) for follow in wrapper.follows()]
            table.probes += wrapper.probes()
            table.stacks += [(wrapper.scope.layer, stack) for stack in wrapper.stacks()]
            table.costs += [(wrapper.scope.layer, cost) for cost in wrapper.costs()]
            table.consumers += [(wrapper.scope.layer, consumer) for consumer in wrapper.consumers()]
            table.gains += [(wrapper.scope.layer, gain) for gain in wrapper.gains()]
            table.checks.append(wrapper.check)
            stack = getattr(wrapper, "layers", None)
            if stack is not None:
                table.layers = stack()
        trees = [d for e in table.entries for d in e.dims] + [f.tree for _, f in table.follows]
        for tree in trees:
            for axis in tree.axes():
                table.axes.setdefault(axis.key, axis)
        return table

    def part(self, layer: int) -> SliceTable:
        """The rows of one layer alone."""
        return dataclasses.replace(
            self,
            entries=[entry for entry in self.entries if entry.layer == layer],
            follows=[row for row in self.follows if row[0] == layer],
            stacks=[row for row in self.stacks if row[0] == layer],
            layers=None,
        )

    def hparams(self) -> dict[str, int]:
        """hparam -> its full size, in the whole model."""
        return {axis.hparam: axis.value for axis in self._everywhere()}

    def _everywhere(self) -> list[Axis]:
        return [*self.axes.values(), *self.elsewhere.values()]

    def settle(self, sizes: Sizes) -> dict[str, int]:
        """Every hparam's size under `sizes`: what is not given keeps its size.

        Where groups go and the size of what lies in them is not given, the groups that stay keep
        theirs (fewer query groups: fewer heads, as many in each).
        """
        full = {**self.hparams(), **{hparam: int(size) for hparam, size in sizes.items()}}
        for axis in self._everywhere():
            if axis.within is not None and not axis.per_group and axis.hparam not in sizes:
                full[axis.hparam] = int(axis.width * axis.groups_in(full))
        return full

    def check(self, sizes: Sizes, known: tuple[str, ...] = ()) -> None:
        """Refuses sizes that cannot be cut from this model.

        Args:
            known: hparams that other models have, for a clearer message.

        Raises:
            UserError: unknown hparam, size below 1 or above the full size, one its groups do not
                divide, or one a layer cannot have.
        """
        full = self.hparams()
        for hparam, size in sizes.items():
            if hparam not in full:
                have = "; this model has: " + ", ".join(f"{k}={v}" for k, v in full.items())
                if hparam in known:
                    raise UserError(f"{hparam} is no dimension of {type(self.model).__name__} here{have}")
                raise UserError(f"unknown hparam {hparam!r}{nearest(hparam, full)}{have}")
            if isinstance(size, bool) or not isinstance(size, int):
                raise UserError(f"{hparam}={size!r} is not an integer")
            if not 1 <= size <= full[hparam]:
                raise UserError(f"{hparam}={size} is outside 1..{full[hparam]} (the model's size)")
        settled = self.settle(sizes)
        for axis in self._everywhere():
            _check_groups(axis, settled)
        for check in self.checks:
            check(settled)

    def first(self, sizes: Sizes) -> Kept:
        """The first units of every axis under `sizes`: what a sorted model keeps."""
        return {
            axis.key: torch.arange(int(axis.width_in(sizes))).repeat(axis.groups, 1)
            for axis in self.axes.values()
            if axis.hparam != DEPTH
        }


def _check_groups(axis: Axis, sizes: Sizes) -> None:
    groups, size = int(axis.groups_in(sizes)), int(sizes[axis.hparam])
    if not axis.per_group and size % groups:
        below, above = size // groups * groups or groups, -(-size // groups) * groups
        raise UserError(
            f"{axis.hparam}={size} is not a multiple of its {groups} groups "
            f"(every group keeps the same number); nearest choices: {below}, {above}"
        )
    if axis.within is not None and int(axis.width_in(sizes)) > axis.width:
        raise UserError(
            f"{axis.hparam}={size} in {axis.within.hparam}={groups} is {axis.width_in(sizes)} each, "
            f"the model has {axis.width}; largest choice: {axis.width * groups}"
        )
    if size % axis.shares and not axis.per_group:
        raise UserError(f"{axis.hparam}={size} does not divide over {axis.shares} ranks")


def _entries(model: nn.Module, wrappers: list[DynamicModule], shards: int) -> list[Entry]:
    named = {
        (id(module), attribute): (name + attribute, counted)
        for name, module in ((n + "." if n else "", m) for n, m in model.named_modules())
        for tensors, counted in ((module._parameters, True), (module._buffers, False))
        for attribute, tensor in tensors.items()
        if tensor is not None
    }
    found: dict[tuple[int, str], Entry] = {}
    copies = {f"{w.scope.path}.{n}".lstrip(".") for w in wrappers for n in getattr(w, "copies", tuple)()}
    for wrapper in wrappers:
        layer = wrapper.scope.layer
        for row in wrapper.slices():
            key = (id(row.module), row.name)
            if key not in named:
                raise UserError(f"{type(wrapper).__name__} slices {row.name}, which is no tensor")
            name, counted = named[key]
            if key not in found:
                dims: list[Layout] = [Fixed(n) for n in row.tensor().shape]
                counted = counted and name not in copies
                found[key] = Entry(name, row.module, row.name, dims, layer, counted, row.unit)
            length = row.tensor().shape[row.dim]
            if row.tree.full() not in (length, length * shards):
                raise UserError(
                    f"{name}: dimension {row.dim} is {row.tensor().shape[row.dim]} long, its "
                    f"layout {row.tree.full()}: a config field and the weights disagree"
                )
            found[key].dims[row.dim] = row.tree
        for path in wrapper.untouched:
            owner_path, _, attribute = path.rpartition(".")
            owner = wrapper.module.get_submodule(owner_path)
            tensor = getattr(owner, attribute, None)
            key = (id(owner), attribute)
            if tensor is not None and key in named and key not in found:
                name, counted = named[key]
                dims = [Fixed(n) for n in tensor.shape]
                found[key] = Entry(name, owner, attribute, dims, layer, counted)
    unknown = [name for key, (name, _) in named.items() if key not in found]
    if unknown:
        raise UserError(
            "unknown tensors that no wrapper's table covers: "
            + ", ".join(unknown[:5])
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            + "; pruning would leave them behind, so it stops here"
        )
    seen: set[int] = set()
    for entry in found.values():
        tensor = entry.tensor()
        if id(tensor) in seen:
            entry.counted = False
        seen.add(id(tensor))
    return list(found.values())
