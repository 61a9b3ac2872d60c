"""The search against every combination, on random maps: the budget is always kept, the drop is the least."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous.bisection import monotone, search


@st.composite
def maps(draw):
    """(choices, drops, weights of a cost) of one to four axes."""
    choices, drops = {}, {}
    for n in range(draw(st.integers(1, 4))):
        sizes = sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4)))
        choices[f"axis{n}"] = sizes
        # Few values, so that ties are common; noise may make a cut look like a gain.
        drops[f"axis{n}"] = {s: draw(st.sampled_from([-0.1, 0.0, 0.1, 0.2, 0.5, 1.0])) for s in sizes[:-1]}
    weights = [draw(st.integers(1, 9)) for _ in choices]
    pair = draw(st.integers(0, 5))
    return choices, drops, weights, pair


def cost_of(weights, pair):
    """Linear in each axis, and a product of the first two: as layers in a row cost."""

    def cost(name, sizes):
        values = list(sizes.values())
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        return total + pair * values[0] * values[min(1, len(values) - 1)]

    return cost


def combinations(choices):
    for sizes in itertools.product(*choices.values()):
        yield dict(zip(choices, sizes, strict=True))


@given(maps(), st.floats(0, 1))
def test_a_satisfiable_budget_is_satisfied_with_the_least_drop(drawn, share):
    choices, drops, weights, pair = drawn
    cost = cost_of(weights, pair)
    costs = [cost("c", sizes) for sizes in combinations(choices)]
    limit = min(costs) + share * (max(costs) - min(costs))
    found = search(choices, drops, cost, {"c": limit})
    assert cost("c", found.sizes) <= limit and found.costs == {"c": cost("c", found.sizes)}
    assert all(found.sizes[key] in sizes for key, sizes in choices.items())
    drops = monotone(choices, drops)
    worst = lambda sizes: max(drops[key][n] for key, n in sizes.items())
    # Independent truth: of all combinations inside the budget, the least worst drop.
    least = min(worst(sizes) for sizes in combinations(choices) if cost("c", sizes) <= limit)
    assert worst(found.tolerated) == least == found.allowed_drop
    assert worst(found.sizes) <= least


@given(maps(), st.floats(0, 1))
def test_what_the_budget_leaves_is_given_back(drawn, share):
    choices, drops, weights, pair = drawn
    cost = cost_of(weights, pair)
    costs = [cost("c", sizes) for sizes in combinations(choices)]
    limit = min(costs) + share * (max(costs) - min(costs))
    found = search(choices, drops, cost, {"c": limit})
    for key, sizes in choices.items():
        assert found.sizes[key] >= found.tolerated[key]
        larger = [n for n in sizes if n > found.sizes[key]][:1]
        assert all(cost("c", {**found.sizes, key: n}) > limit for n in larger)
    assert search(choices, drops, cost, {"c": limit}, fill=False).sizes == found.tolerated


@given(maps())
def test_an_impossible_budget_is_refused_with_the_range(drawn):
    choices, drops, weights, pair = drawn
    cost = cost_of(weights, pair)
    lowest = min(cost("c", sizes) for sizes in combinations(choices))
    with pytest.raises(UserError, match=f"the choices reach from {lowest}"):
        search(choices, drops, cost, {"c": lowest - 0.5})


def test_several_limits_are_all_kept():
    choices = {"a": [1, 2, 3, 4], "b": [1, 2, 3, 4]}
    drops = {"a": {1: 3.0, 2: 2.0, 3: 1.0}, "b": {1: 0.3, 2: 0.2, 3: 0.1}}
    cost = lambda name, sizes: sizes["a"] if name == "x" else sizes["a"] + sizes["b"]
    found = search(choices, drops, cost, {"x": 3, "y": 5})
    assert (
        found.allowed_drop == 1.0 and found.tolerated == {"a": 3, "b": 1} and found.sizes == {"a": 3, "b": 2}
    )


def test_the_smallest_candidate_is_the_last_resort():
    # A measured time that only the smallest candidate keeps, though it is not monotone.
    choices = {"a": [1, 2, 4], "b": [1, 2, 4]}
    drops = {"a": {1: 0.1, 2: 0.1}, "b": {1: 0.1, 2: 0.1}}
    cost = lambda name, sizes: float(np.prod(list(sizes.values())))
    assert search(choices, drops, cost, {"t": 1.0}, fill=False).sizes == {"a": 1, "b": 1}


def test_a_missing_or_broken_drop_is_refused():
    with pytest.raises(ValueError, match="a: no drop at 1"):
        monotone({"a": [1, 2]}, {"a": {}})
    with pytest.raises(ValueError, match="a: no drop at 1"):
        monotone({"a": [1, 2]}, {"a": {1: float("nan")}})
