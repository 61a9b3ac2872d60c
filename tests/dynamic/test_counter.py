"""The counter against models that were really cut, one by one and over a grid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from toy import FFN, GROUPS, HIDDEN, LAYERS, WIDTH, Toy, table_of

from mbridge_prune.dynamic import DEPTH, Axis, Counter, Fixed, Shape, Units, shapes, shrink

GRID = list(itertools.product([1, 4, HIDDEN], [3, FFN], [1, GROUPS], [2, WIDTH], [1, 3, LAYERS]))
NAMES = ("hidden_size", "ffn", "groups", "width", DEPTH)


@pytest.mark.parametrize("tied", [True, False])
def test_grid_equals_one_by_one_equals_the_real_count(tied):
    counter = Counter(shapes(table_of(Toy(tied))))
    columns = {name: np.array(column) for name, column in zip(NAMES, zip(*GRID, strict=True), strict=True)}
    counted = counter.params(columns)
    assert counted.dtype == np.int64 and counted.shape == (len(GRID),)
    for values, params in zip(GRID, counted, strict=True):
        sizes = dict(zip(NAMES, values, strict=True))
        model = Toy(tied)
        shrink(table_of(model), sizes, range(sizes[DEPTH]))
        real = sum(p.numel() for p in model.parameters())
        one = counter.params(sizes)
        assert isinstance(one, int) and one == params == real


def test_what_is_not_given_stays_full():
    model = Toy()
    counter = Counter(shapes(table_of(model)))
    assert counter.params({}) == sum(p.numel() for p in model.parameters())


def test_layers_of_different_sizes_die_in_their_order():
    """Layer 0 holds 10, layer 1 holds 100, layer 2 holds 1000 parameters; 2 matters most, then 0."""
    tensors = [Shape((Fixed(10 ** (n + 1)),), n) for n in range(3)] + [Shape((Fixed(7),), None)]
    counter = Counter(tensors, layer_order=[2, 0, 1])
    assert [counter.params({DEPTH: n}) for n in (1, 2, 3)] == [1007, 1017, 1117]
    assert counter.params({DEPTH: np.array([3, 1])}).tolist() == [1117, 1007]


def test_counts_beyond_32_bits():
    axis = Axis("h", 200_000, "h")
    counter = Counter([Shape((Units(axis), Units(axis)), None)])
    assert counter.params({"h": np.array([100_000, 200_000])}).tolist() == [10**10, 4 * 10**10]
