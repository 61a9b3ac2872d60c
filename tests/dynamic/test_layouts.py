"""Layouts against a labelling of every entry by plain loops."""

from __future__ import annotations

import itertools
from collections import Counter as Bag

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbridge_prune.dynamic import Axis, Concat, Fixed, PerGroup, Repeat, Units

small = st.integers(1, 3)
Label = tuple


@st.composite
def axes(draw, depth: int = 2, names=None) -> Axis:
    """An axis: plain, grouped, or within an axis that is itself prunable."""
    names = names if names is not None else itertools.count()
    hparam, width, per_group = f"h{next(names)}", draw(st.integers(1, 4)), draw(st.booleans())
    if depth and draw(st.booleans()):
        within = draw(axes(depth - 1, names))
        return Axis(hparam, width * within.size, f"k.{hparam}", within.size, within, per_group)
    groups = draw(small)
    return Axis(hparam, width * groups, f"k.{hparam}", groups, None, per_group)


@st.composite
def layouts(draw):
    """(layout, its axes, with `within` axes before those that lie in them)."""
    names = itertools.count()
    roots = draw(st.lists(axes(names=names), min_size=1, max_size=2))

    def leaf():
        axis = draw(st.sampled_from(roots))
        kind = draw(st.sampled_from(["units", "repeat", "groups", "fixed"]))
        match kind:
            case "units":
                return Units(axis)
            case "repeat":
                return Repeat(Units(axis), draw(small))
            case "groups":
                return PerGroup(axis, draw(small), draw(st.integers(0, 3)))
        return Fixed(draw(st.integers(0, 3)))

    layout = leaf()
    for _ in range(draw(st.integers(0, 2))):
        layout = draw(
            st.sampled_from([lambda a: a + leaf(), lambda a: Concat(a, a), lambda a: Repeat(a, 2)])
        )(layout)
    chain = []
    for axis in roots:
        while axis is not None:
            chain.insert(0, axis)
            axis = axis.within
    return layout, chain


@st.composite
def sizes_of(draw, chain):
    """A valid size for every axis, as its hparam states it; outer axes first."""
    sizes, left = {}, {}
    for axis in sorted(chain, key=nesting):
        groups = left[axis.within.key] if axis.within else axis.groups
        width = draw(st.integers(1, axis.size // axis.groups))
        left[axis.key] = width * groups
        sizes[axis.hparam] = width if axis.per_group else width * groups
    return sizes


def nesting(axis) -> int:
    return 0 if axis.within is None else 1 + nesting(axis.within)


def units(axis: Axis, kept) -> list[tuple[Label, int]]:
    """[(label, group)] of the units left, in order; `kept` maps a key to places for each group."""
    if axis.within is None:
        groups = [(("group", g), g) for g in range(axis.groups)]
    else:
        full = [label for label, _ in units(axis.within, {})]
        groups = [(label, full.index(label)) for label, _ in units(axis.within, kept)]
    width = axis.size // axis.groups
    return [
        ((axis.key, label, place), g)
        for label, g in groups
        for place in (kept[axis.key][g].tolist() if axis.key in kept else range(width))
    ]


def labels(layout, kept) -> list[Label]:
    """A name for every entry of the dimension that is left, in order."""
    match layout:
        case Fixed():
            return [("fixed", i) for i in range(layout.n)]
        case Units():
            return [label for label, _ in units(layout.axis, kept)]
        case Repeat():
            return [(inner, i) for inner in labels(layout.inner, kept) for i in range(layout.n)]
        case Concat():
            return [(number, x) for number, part in enumerate(layout.parts) for x in labels(part, kept)]
        case PerGroup():
            out = []
            for group, members in itertools.groupby(units(layout.axis, kept), key=lambda u: u[0][1]):
                out += [(label, i) for label, _ in members for i in range(layout.n)]
                out += [("tail", group, i) for i in range(layout.tail)]
            return out
    raise TypeError(layout)


def first(chain, sizes):
    """The leading places, by the definition of `per_group` and of groups."""
    widths, left = {}, {}
    for axis in sorted(chain, key=nesting):
        groups = left[axis.within.key] if axis.within else axis.groups
        widths[axis.key] = sizes[axis.hparam] // (1 if axis.per_group else groups)
        left[axis.key] = widths[axis.key] * groups
    return {a.key: torch.arange(widths[a.key]).repeat(a.groups, 1) for a in chain}


@given(st.data())
def test_size_equals_entries_equals_labels(data):
    layout, chain = data.draw(layouts())
    sizes = data.draw(sizes_of(chain))
    kept = first(chain, sizes)
    full, want = labels(layout, {}), labels(layout, kept)
    entries = layout.entries(kept).tolist()
    assert [full[i] for i in entries] == want
    assert layout.size(sizes) == len(entries)
    assert layout.full() == len(full) == len(set(full))
    assert set(layout.axes()) <= set(chain)


@given(st.data())
def test_any_order_is_a_permutation_of_labels(data):
    layout, chain = data.draw(layouts())
    seed = data.draw(st.integers(0, 999))
    torch.manual_seed(seed)
    orders = {a.key: a.order_by(torch.rand(a.size)) for a in chain}
    entries = layout.entries(orders).tolist()
    full = labels(layout, {})
    assert sorted(entries) == list(range(layout.full()))
    assert [full[i] for i in entries] == labels(layout, orders)


@given(st.data())
def test_size_is_vectorised(data):
    layout, chain = data.draw(layouts())
    grid = [data.draw(sizes_of(chain)) for _ in range(4)]
    arrays = {name: np.array([s[name] for s in grid]) for name in grid[0]}
    got = np.broadcast_to(layout.size(arrays), 4)
    assert got.tolist() == [layout.size(s) for s in grid]


@given(groups=small, width=st.integers(1, 5), data=st.data())
def test_order_by_sorts_inside_groups_and_keeps_ties(groups, width, data):
    scores = data.draw(st.lists(st.integers(0, 2), min_size=groups * width, max_size=groups * width))
    axis = Axis("h", groups * width, "k", groups)
    order = axis.order_by(torch.tensor(scores, dtype=torch.float32))
    for g in range(groups):
        mine = scores[g * width : (g + 1) * width]
        assert order[g].tolist() == sorted(range(width), key=lambda p: (-mine[p], p))
    assert Bag(order.flatten().tolist()) == Bag({p: groups for p in range(width)})


def test_scores_of_another_size_are_refused():
    with pytest.raises(ValueError, match="k: .*3.* scores for 4 units"):
        Axis("h", 4, "k").order_by(torch.zeros(3))


def test_axes_that_cannot_be():
    with pytest.raises(ValueError, match="5 units do not divide into 2 groups"):
        Axis("h", 5, "k", groups=2)
    with pytest.raises(ValueError, match="2 groups within 3 units"):
        Axis("h", 4, "k", groups=2, within=Axis("g", 3, "g"))


def test_megatron_qkv_by_hand():
    """Two query groups of two heads, head_dim 1: q q k v q q k v; the second and the first head stay."""
    heads = Axis("num_attention_heads", 4, "heads", groups=2)
    kept = {"heads": torch.tensor([[1], [0]])}
    assert PerGroup(heads, 1, 2).entries(kept).tolist() == [1, 2, 3, 4, 6, 7]
