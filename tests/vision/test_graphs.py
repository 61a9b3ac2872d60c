"""On some sixty small networks: what is found, sorted, sliced, exported, counted and restored."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES, built

from mbridge_prune.dynamic import select, shrink, sort
from mbridge_prune.heterogeneous import Forward, ForwardCosts
from mbridge_prune.heterogeneous.saved import Architecture, restore, save
from mbridge_prune.vision.table import table_of

pytestmark = pytest.mark.parametrize("name", CASES)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def traced(name):
    model, x = built(name)
    return model, x, table_of(model, Forward.of(x))


def shuffled(table, seed=3):
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randperm(axis.size, generator=random)[None] for key, axis in table.axes.items()}


def subnets(table):
    """Every axis smaller, each another share; and one axis alone at a single unit."""
    yield {key: max(1, axis.size * (n % 3 + 1) // 4) for n, (key, axis) in enumerate(table.axes.items())}
    yield {next(iter(table.axes)): 1}


def test_the_axes_are_found(name):
    _, _, found = traced(name)
    assert {key: axis.size for key, axis in found.table.axes.items()} == CASES[name].axes


def test_sorting_preserves_the_outputs(name):
    model, x, found = traced(name)
    before = model(x)
    weights = copy.deepcopy(model.state_dict())
    sort(found.table, shuffled(found.table))
    assert any(not torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(model(x), before, **TOLERANCE)


def test_sliced_equals_the_dense_network_whose_units_nobody_reads(name):
    if CASES[name].renormed:
        pytest.skip("a norm over fewer channels is another norm: see test_norms.py")
    model, x, found = traced(name)
    order = shuffled(found.table)
    for sizes in subnets(found.table):
        dense = copy.deepcopy(model)
        kept = {key: order[key][:, : sizes.get(key, axis.size)] for key, axis in found.table.axes.items()}
        modules = dict(dense.named_modules())
        for row in found.channels.rows:
            if row.reads:
                stay = found.channels.layout(row.ids_n).entries(kept)
                gone = torch.ones(len(row.ids_n), dtype=torch.bool)
                gone[stay] = False
                weight = getattr(modules[found.channels.paths[row.module]], row.name)
                weight.data.movedim(row.dim, 0)[gone] = 0
        expected = dense(x)
        model_again, _, again = traced(name)
        sort(again.table, order)
        with select(again.table, sizes) as small:
            torch.testing.assert_close(small(x), expected, **TOLERANCE)
        del model_again


def test_exported_equals_selected_and_counts_equal_independent_counts(name):
    for number in range(2):
        model, x, found = traced(name)
        sizes = list(subnets(found.table))[number]
        costs = ForwardCosts(found.table, Forward.of(x))
        planned = costs.params(sizes), costs.flops(sizes)
        with select(found.table, sizes):
            selected = model(x)
        assert costs.params({}) == sum(p.numel() for p in model.parameters())
        shrink(found.table, sizes)
        assert torch.equal(model(x), selected)
        # The counter does not see into the CPU's fused attention.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
        assert planned == (sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def test_restored_gives_identical_outputs(name, tmp_path):
    model, x, found = traced(name)
    sizes = next(iter(subnets(found.table)))
    record = Architecture.of(model, found.table)
    follows = [row for _, row in found.table.follows]
    before = [getattr(row.owner, row.name) for row in follows]
    shrink(found.table, sizes)
    record.follow(model, follows, before)
    record.attach(model)
    fresh, _ = built(name)
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        nn.init.constant_(tensor, 1)
    assert torch.equal(restore(fresh, save(model, tmp_path / "x.safetensors"))(x), model(x))


def test_select_gives_the_network_back_exactly(name):
    model, x, found = traced(name)
    before, said = copy.deepcopy(model.state_dict()), str(model)
    for sizes in subnets(found.table):
        with select(found.table, sizes):
            model(x)
    assert str(model) == said
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
