"""Costs, choices, map, cut and saved file of a chain of linear layers, against counts made by hand."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from chain import Chain, DynamicChain, table_of
from safetensors import safe_open
from torch import nn

import mbridge_prune as mbp
from mbridge_prune.dynamic import select, shrink, sort, wraps
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import Forward, ForwardCosts, Heterogeneous, choices_of, measure
from mbridge_prune.heterogeneous.saved import Architecture
from mbridge_prune.search.store import Store

WIDTHS = (5, 12, 8, 3)
A, B = "layers.0.out_features", "layers.1.out_features"
X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def by_hand(a: int, b: int) -> tuple[int, int]:
    """(parameters, operations on seven rows) of a chain 5 - a - b - 3."""
    products = 5 * a + a * b + b * 3
    return products + a + b + 3, 2 * 7 * products


def run_of(model, constraints, **options):
    table = table_of(model)
    choices = choices_of(table, 2, **options)
    return Heterogeneous("fastnas", table, constraints, Forward.of(X), choices)


def cut(model, flops="50%"):
    run = run_of(model, {"flops": flops})
    orders = {key: torch.randperm(axis.size)[None] for key, axis in run.table.axes.items()}
    sort(run.table, orders)
    drops = {key: {n: 1 / n for n in sizes[:-1]} for key, sizes in run.choices.items()}
    return run.cut(run.search(drops), orders, {"score_func": by_hand, "seed": 3}), orders


@pytest.mark.parametrize(("a", "b"), [(12, 8), (6, 8), (12, 1), (3, 5)])
def test_costs_are_those_counted_by_hand(a, b):
    costs = ForwardCosts(table_of(Chain(*WIDTHS)), Forward.of(X))
    assert (costs.params({A: a, B: b}), costs.flops({A: a, B: b})) == by_hand(a, b)
    assert costs.rest == 0 and costs.latency_ms({A: a}) > 0


def test_what_no_row_multiplies_is_counted_as_it_is():
    class More(Chain):
        def forward(self, x_nc):
            return super().forward(x_nc) @ torch.ones(3, 11)

    More.__module__, More.__qualname__ = Chain.__module__, Chain.__qualname__
    costs = ForwardCosts(table_of(More(*WIDTHS)), Forward.of(X))
    assert costs.rest == 2 * 7 * 3 * 11 and costs.flops({A: 6}) == by_hand(6, 8)[1] + costs.rest


def test_dummy_input_in_its_forms():
    x, y = torch.ones(1), torch.zeros(1)
    assert Forward.of(x).args == (x,) and Forward.of((x, y)).args == (x, y)
    assert Forward.of((x, {"y": y})).kwargs == {"y": y} and Forward.of({"x": x}).kwargs == {"x": x}
    with pytest.raises(UserError, match="dummy_input is needed"):
        Forward.of(None)


def test_choices_are_multiples_and_keep_enough():
    table = table_of(Chain(*WIDTHS))
    assert choices_of(table, 4) == {A: [4, 8, 12], B: [4, 8]}
    assert choices_of(table, 2, largest_cut=0.5) == {A: [6, 8, 10, 12], B: [4, 6, 8]}
    assert choices_of(table, 1, at_most=3)[A] == [2, 11, 12]
    assert choices_of(table, {A: 5}, skip=["layers.1.*"]) == {A: [5, 10, 12], B: [8]}
    with pytest.raises(UserError, match=r"no axis 'layers.1.out_feature' \(did you mean"):
        choices_of(table, 1, skip=["layers.1.out_feature"])


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({}, "need a budget: flops, params, latency_ms"),
        ({"flop": "50%"}, "did you mean 'flops'"),
        ({"export_config": {A: 4}}, "searches within a budget"),
        ({"flops": "5%"}, r"the choices reach from 280 to 2,520"),
        ({"params": 10_000}, "inside the budget as it is"),
        ({"flops": "half"}, "is no budget"),
    ],
)
def test_budgets_that_cannot_be_are_refused_at_the_start(constraints, message):
    model = Chain(*WIDTHS)
    with pytest.raises(UserError, match=message):
        run_of(model, constraints)
    assert model.layers[0].weight.shape == (12, 5)


def test_the_profile_comes_first(capsys):
    run = run_of(Chain(*WIDTHS), {"flops": "50%"})
    said = capsys.readouterr().out
    assert [word in said for word in ("min", "centroid", "max", "at most")] == [True] * 4
    assert run.profile["max"] == {"flops": by_hand(12, 8)[1], "params": by_hand(12, 8)[0]}
    assert run.profile["min"]["params"] == by_hand(2, 2)[0]


def test_the_cut_model_is_what_the_plan_says():
    model = Chain(*WIDTHS)
    full = copy.deepcopy(model)
    plan, orders = cut(model)
    a, b = plan.sizes_after[A], plan.sizes_after[B]
    assert plan.costs["flops"] == {"before": by_hand(12, 8)[1], "after": by_hand(a, b)[1]}
    assert plan.params_after == sum(p.numel() for p in model.parameters()) == by_hand(a, b)[0]
    assert plan.costs["flops"]["after"] <= 0.5 * plan.costs["flops"]["before"]
    assert (model.layers[0].out_features, model.layers[1].in_features) == (a, a)
    assert plan.kept[A] == [orders[A][0, :a].tolist()]
    # Independent truth: the full model whose removed units nobody reads.
    for layer, key in ((1, A), (2, B)):
        gone = [u for u in range(WIDTHS[layer]) if u not in plan.kept[key][0]]
        full.layers[layer].weight.data[:, gone] = 0
    assert torch.allclose(model(X), full(X), atol=1e-6)


def test_saved_and_restored_gives_identical_outputs(tmp_path):
    model = Chain(*WIDTHS)
    plan, _ = cut(model)
    with torch.no_grad():
        model.layers[0].bias += 1  # fine-tuned
    path = mbp.save(model, tmp_path / "deep" / "model.safetensors")
    again = mbp.restore(Chain(*WIDTHS, seed=5), path)
    assert torch.equal(again(X), model(X)) and again.layers[1].in_features == plan.sizes_after[A]
    with safe_open(path, "pt") as file:
        (kept,) = json.loads(file.metadata()["architecture"])["cuts"]
    assert (kept["mode"], kept["sizes_after"], kept["kept"]) == ("fastnas", plan.sizes_after, plan.kept)
    assert kept["config"] == {"score_func": "by_hand", "seed": 3}
    # What was restored can be saved, and copies of it too.
    assert mbp.save(copy.deepcopy(again), path) == path
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.safetensors"]


class Holder(nn.Module):
    """A network with a part called `module`, as a wrapper has."""

    def __init__(self, seed=0):
        super().__init__()
        self.module = Chain(*WIDTHS, seed=seed)

    def forward(self, x):
        return self.module(x)


def test_a_part_called_module_is_no_wrapper(tmp_path):
    model = Holder()
    cut_ = {A: 4, B: 3}
    table = table_of(model)
    record = Architecture.of(model, table)
    follows = [row for _, row in table.follows]
    before = [getattr(row.owner, row.name) for row in follows]
    shrink(table, cut_)
    record.follow(model, follows, before)
    record.attach(model)
    again = mbp.heterogeneous.saved.restore(Holder(seed=3), mbp.save(model, tmp_path / "x"))
    assert torch.equal(again(X), model(X))
    # Inside a wrapper, the network is what is saved.
    wrapped = nn.Module()
    wrapped.module = model
    again = mbp.heterogeneous.saved.restore(Holder(seed=3), mbp.save(wrapped, tmp_path / "y"))
    assert torch.equal(again(X), model(X))


class Lazy(Chain):
    """It makes a buffer in its first forward, and keeps one that is no part of its state."""

    def __init__(self, *widths, seed=0):
        super().__init__(*widths, seed=seed)
        self.register_buffer("grid", None, persistent=False)

    def forward(self, x_nc):
        if self.grid is None:
            self.grid = torch.full((1, 5), 2.0)
        return super().forward(x_nc * self.grid)


@wraps(Lazy, family="chain")
class DynamicLazy(DynamicChain):
    untouched = ("grid",)


def test_a_buffer_that_the_model_makes_itself_is_not_saved(tmp_path):
    model = Lazy(*WIDTHS)
    cut(model)
    again = mbp.restore(Lazy(*WIDTHS, seed=5), mbp.save(model, tmp_path / "x"))
    assert torch.equal(again(X), model(X))
    cut(again, "80%")
    assert mbp.save(again, tmp_path / "x")


def test_a_model_with_gradients_of_its_last_step_trains_on_after_the_cut():
    model = Chain(*WIDTHS)
    model(X).sum().backward()
    run = run_of(model, {"flops": "50%"})
    cut_ = [model.layers[0].weight, model.layers[0].bias, model.layers[1].weight]
    before = [parameter.grad.clone() for parameter in cut_]
    with select(run.table, {A: 4}):
        assert model.layers[0].weight.grad is None and model.layers[2].weight.grad is not None
        model(X).sum().backward()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(cut_, before, strict=True))
    cut(model)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_a_second_cut_is_restored_from_the_full_architecture(tmp_path):
    model = Chain(*WIDTHS)
    cut(model, "60%")
    cut(model, "60%")
    again = mbp.restore(Chain(*WIDTHS), mbp.save(model, tmp_path / "twice.safetensors"))
    assert torch.equal(again(X), model(X))


def test_restore_refuses_other_architectures_and_changes_nothing(tmp_path):
    model = Chain(*WIDTHS)
    cut(model)
    path = mbp.save(model, tmp_path / "model.safetensors")
    other = Chain(5, 12, 9, 3)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match=r"layers.1.weight is \(9, 12\), expected \(8, 12\)"):
        mbp.restore(other, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    with pytest.raises(UserError, match=r"layers.3.weight is only in the model"):
        mbp.restore(Chain(5, 12, 8, 3, 2), path)
    with pytest.raises(UserError, match="it is a Linear, the file is of a Chain"):
        mbp.restore(nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="pruned already"):
        mbp.restore(model, path)
    (tmp_path / "foreign").write_text("something")
    with pytest.raises(UserError, match="no readable model file"):
        mbp.restore(Chain(*WIDTHS), tmp_path / "foreign")


def test_save_refuses_what_it_did_not_cut_and_overwrites_nothing_else(tmp_path):
    with pytest.raises(UserError, match="Chain was not pruned by fastnas or gradnas"):
        mbp.save(Chain(*WIDTHS), tmp_path / "x")
    model = Chain(*WIDTHS)
    cut(model)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        mbp.save(model, tmp_path / "notes.txt")
    with pytest.raises(UserError, match="give another path"):
        mbp.save(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    model.extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match="other tensors than when it was pruned: extra"):
        mbp.save(model, tmp_path / "x")


def test_the_map_is_measured_axis_by_axis_and_taken_up_again(tmp_path):
    run = run_of(Chain(*WIDTHS), {"flops": "50%"})
    calls = []

    def score(model):
        calls.append((model.layers[0].out_features, model.layers[1].out_features))
        return -float(model(X).detach().square().mean())

    path = tmp_path / "map.jsonl"
    full, drops = measure(run.table, run.choices, score, Store(path, run.identity()))
    assert calls[0] == (12, 8) and set(calls[1:]) == {(n, 8) for n in (2, 4, 6, 8, 10)} | {
        (12, n) for n in (2, 4, 6)
    }
    with select(run.table, {A: 4}) as model:
        assert drops[A][4] == pytest.approx(full - score(model), abs=1e-7)
    # Killed after half of it: the other half is measured, the result is the same.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:7])
    calls.clear()
    assert measure(run.table, run.choices, score, Store(path, run.identity())) == (full, drops)
    assert len(calls) == 9 - 4
    calls.clear()
    # A map of another model is set aside.
    other = run_of(Chain(*WIDTHS, seed=9), {"flops": "50%"})
    measure(other.table, other.choices, score, Store(path, other.identity()))
    assert len(calls) == 9 and (tmp_path / "map.1.jsonl").exists()


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "gave nan"), (None, "returned NoneType"), ("x", "returned str")]
)
def test_a_score_that_is_no_number_is_refused(value, message):
    run = run_of(Chain(*WIDTHS), {"flops": "50%"})
    with pytest.raises(UserError, match=message):
        measure(run.table, run.choices, lambda model: value, Store(None, {}))
