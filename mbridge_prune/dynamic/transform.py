"""Sort, select, shrink: the three ways to apply the table to the weights. None knows a layer type."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mbridge_prune.dynamic.axis import Axis, Sizes
from mbridge_prune.dynamic.layout import Fixed, Kept, Units
from mbridge_prune.dynamic.stack import Layers, Stack, rearrange
from mbridge_prune.dynamic.table import Entry, SliceTable


def sort(table: SliceTable, orders: Kept, progress: Callable[[int], None] | None = None) -> None:
    """Permutes the weights in place so that units stand in the given order; the function stays.

    Args:
        orders: axis key -> [groups, width] order inside each group. Axes left out keep theirs.
        progress: called with 1 after each tensor.
    """
    with torch.no_grad():
        for entry in _present(table):
            tensor, permuted = entry.tensor(), None
            for dim, layout in enumerate(entry.dims):
                if any(axis.key in orders for axis in layout.axes()):
                    entries = layout.entries(orders)
                    source = tensor if permuted is None else permuted
                    permuted = source.index_select(dim, entries.to(source.device))
            if permuted is not None:
                tensor.copy_(permuted)
            if progress is not None:
                progress(1)
        for axis in _stacked(table):
            if axis.key in orders:
                _place_units(table, axis, orders)


def shrink(
    table: SliceTable,
    sizes: Sizes,
    layers: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Cuts a sorted model to `sizes` for good, tensor by tensor.

    Parameters stay the same objects (their Megatron attributes survive); config fields and plain
    attributes follow; gradients of what is cut are dropped. Peak memory is the model plus its largest tensor.

    Args:
        layers: global numbers (from 0) of the layers to keep, in order; None keeps all.
        progress: called with 1 after each tensor.
    """
    if layers is not None:
        _keep_layers(table, layers)
    kept = table.first(sizes)
    with torch.no_grad():
        for entry in _present(table):
            cut = _cut(entry, kept)
            if cut is not None:
                # A view would keep the full weight alive; what is a tensor of its own needs no copy.
                own = cut.is_contiguous() and cut.untyped_storage().nbytes() == cut.nbytes
                entry.tensor().data = cut if own else cut.clone(memory_format=torch.contiguous_format)
                entry.tensor().grad = None  # of the full shape
            if progress is not None:
                progress(1)
    _keep_units(table, sizes, kept)
    _set_attributes(table, sizes)


@contextmanager
def select(table: SliceTable, sizes: Sizes, layers: Sequence[int] | None = None) -> Iterator[nn.Module]:
    """Gives a sorted model the shapes of a candidate, and gives the full model back exactly.

    Leading units are views of the full weights; only dimensions of several blocks are copied,
    once a candidate, nothing a forward. Same arguments as `shrink`.
    """
    data = [(entry.tensor(), entry.tensor().data, entry.tensor().grad) for entry in table.entries]
    attributes = [(f.owner, f.name, getattr(f.owner, f.name)) for _, f in table.follows]
    stacks: list[Stack | Layers] = [stack for _, stack in table.stacks]
    if table.layers is not None and layers is not None:
        stacks.append(table.layers)
    states = [stack.state() for stack in stacks]
    kept = table.first(sizes)
    try:
        if layers is not None:
            _keep_layers(table, layers)
        with torch.no_grad():
            for entry in _present(table):
                cut = _cut(entry, kept)
                if cut is not None:
                    entry.tensor().data = cut.contiguous()
                    entry.tensor().grad = None
        _keep_units(table, sizes, kept)
        _set_attributes(table, sizes)
        yield table.model
    finally:
        for stack, state in zip(stacks, states, strict=True):
            stack.restore(state)
        for tensor, full, gradient in data:
            tensor.grad = None
            tensor.data = full
            tensor.grad = gradient
        for owner, name, value in reversed(attributes):
            setattr(owner, name, value)


def _present(table: SliceTable) -> list[Entry]:
    """One entry for every tensor of the layers that are there (a tied weight has two entries)."""
    kept = None if table.layers is None else set(table.layers.numbers)
    present = [e for e in table.entries if e.layer is None or kept is None or e.layer in kept]
    return list({id(e.tensor()): e for e in reversed(present)}.values())[::-1]


def _cut(entry: Entry, kept: Kept) -> torch.Tensor | None:
    """The remaining part of a tensor (a view where it is leading units), None where all remains."""
    data, changed = entry.tensor().data, False
    for dim, layout in enumerate(entry.dims):
        if isinstance(layout, Fixed):
            continue
        entries = layout.entries(kept)
        n = len(entries)
        if n == data.shape[dim] and torch.equal(entries, torch.arange(n)):
            continue
        changed = True
        if torch.equal(entries, torch.arange(n)):
            data = data.narrow(dim, 0, n)
        else:
            data = data.index_select(dim, entries.to(data.device))
    return data if changed else None


def _set_attributes(table: SliceTable, sizes: Sizes) -> None:
    for _, follow in table.follows:
        setattr(follow.owner, follow.name, follow.make(int(follow.tree.size(sizes))))


def _keep_layers(table: SliceTable, layers: Sequence[int]) -> None:
    if table.layers is None:
        raise ValueError("this model has no stack of layers to shorten")
    table.layers.keep(layers)


def _stacked(table: SliceTable) -> list[Axis]:
    """Axes whose units are whole tensors (experts), of the layers that are there."""
    present = {id(e.unit.axis): e.unit.axis for e in _present(table) if e.unit is not None}
    return list(present.values())


def _keep_units(table: SliceTable, sizes: Sizes, kept: Kept) -> None:
    """Brings the experts that remain into the leading slots of every rank and drops the others."""
    for axis in _stacked(table):
        if int(axis.size_in(sizes)) < axis.size:
            _place_units(table, axis, kept)
            for _, stack in table.stacks:
                if stack.axis is axis:
                    stack.keep(int(axis.size_in(sizes)) // axis.shares)


def _place_units(table: SliceTable, axis: Axis, kept: Kept) -> None:
    roles: dict[str, list[torch.Tensor]] = {}
    for entry in table.entries:
        if entry.unit is not None and entry.unit.axis is axis:
            roles.setdefault(entry.unit.role, []).append(entry.tensor())
    rearrange(axis, roles.values(), Units(axis).entries(kept).tolist())
