"""The whole mode: budgets kept, the best of all candidates found, files, and wrong input in one line."""

from __future__ import annotations

import itertools

import pytest
import torch
from hf_models import FAMILIES, loss, output, tiny, tokens

import mbridge_prune as mbp
from mbridge_prune.dynamic import sort
from mbridge_prune.errors import UserError
from mbridge_prune.heterogeneous import Forward, ForwardCosts, bisection
from mbridge_prune.huggingface import squared_gradients, table_of
from mbridge_prune.huggingface.prices import losses, prices

FINE = [("gradnas", mbp.gradnas.get_gradnas_config(ffn_hidden_size_divisor=2))]
DATA = {"data_loader": [tokens(2, 1), tokens(3, 2)], "loss_func": loss}


def prune(model, constraints=None, config=None):
    constraints = {"flops": "60%"} if constraints is None else constraints
    return mbp.prune(model, FINE, constraints, tokens(), DATA if config is None else config)


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_is_kept_and_save_and_restore_give_the_same_outputs(family, tmp_path):
    model, plan = prune(tiny(family))
    assert plan.mode == "gradnas"
    assert plan.costs["flops"]["after"] <= 0.6 * plan.costs["flops"]["before"]
    assert plan.costs["params"]["after"] == sum(p.numel() for p in model.parameters())
    expected = output(model)
    mbp.save(model, tmp_path / "pruned.safetensors")
    again = mbp.restore(tiny(family, seed=5), tmp_path / "pruned.safetensors")
    assert torch.equal(output(again), expected)
    again.save_pretrained(tmp_path / "hf")
    torch.testing.assert_close(
        output(mbp.from_pretrained(tmp_path / "hf").eval()), expected, rtol=1e-6, atol=1e-5
    )


def test_what_goes_is_what_scores_least():
    model = tiny("bert")
    scores = squared_gradients(table_of(model), **DATA).units
    _, plan = prune(model)
    for key, axis in table_of(model).axes.items():
        kept = plan.kept[key][0]
        gone = [unit for unit in range(len(scores[key])) if unit not in kept]
        assert axis.size == len(kept) == plan.sizes_after[key]
        assert all(scores[key][unit] <= scores[key][kept].min() for unit in gone)


@pytest.mark.parametrize("family", ["bert", "gptj"])
@pytest.mark.parametrize("budget", ["flops", "params"])
def test_no_candidate_that_costs_as_little_loses_less(family, budget):
    model = tiny(family)
    table = table_of(model)
    scores = squared_gradients(table, **DATA)
    sort(table, scores.orders(table))
    choices = {
        k: list(range(1, a.size + 1, 1 if a.size < 9 else 4)) + [20] * (a.size == 20)
        for k, a in table.axes.items()
    }
    choices = {k: sorted(set(v)) for k, v in choices.items()}
    cost = ForwardCosts(table, Forward.of(tokens())).of
    lost = losses(table, scores.units, choices)
    for share in (0.5, 0.65, 0.8):
        limit = share * cost(budget, {})
        found = bisection.search(choices, prices(lost, cost, [budget]), cost, {budget: limit}, fill=False)
        assert cost(budget, found.sizes) <= limit
        total = sum(lost[key][size] for key, size in found.sizes.items())
        filled = bisection.search(choices, prices(lost, cost, [budget]), cost, {budget: limit}, worth=lost)
        assert cost(budget, filled.sizes) <= limit
        assert all(filled.sizes[key] >= size for key, size in found.sizes.items())
        for sizes in itertools.product(*choices.values()):
            candidate = dict(zip(choices, sizes, strict=True))
            if cost(budget, candidate) <= cost(budget, found.sizes):
                assert sum(lost[key][size] for key, size in candidate.items()) >= total * (1 - 1e-9)


def test_two_budgets_are_both_kept():
    _, plan = prune(tiny("gptj"), {"flops": "75%", "params": 7200})
    assert plan.costs["params"]["after"] <= 7200 < plan.costs["params"]["before"]
    assert plan.costs["flops"]["after"] <= 0.75 * plan.costs["flops"]["before"]


def test_scores_are_kept_and_read_again_without_data(tmp_path):
    path = tmp_path / "scores.safetensors"
    _, first = prune(tiny("bert"), config={**DATA, "checkpoint": path})
    _, second = prune(tiny("bert"), {"flops": "60%"}, {"checkpoint": path})
    assert second.kept == first.kept
    _, third = prune(tiny("bert"), {"flops": "50%"}, {"checkpoint": path})
    assert third.costs["flops"]["after"] < second.costs["flops"]["after"]
    with pytest.raises(UserError, match="holds scores of another loss_func"):
        prune(
            tiny("bert"),
            config={**DATA, "loss_func": lambda output, batch: output[0].sum(), "checkpoint": path},
        )
    with pytest.raises(UserError, match="holds scores of another model"):
        prune(tiny("bert", seed=9), config={"checkpoint": path})


def test_scores_of_other_data_are_refused(tmp_path):
    path = tmp_path / "scores.safetensors"
    batches = [tokens(2, 1), tokens(3, 2)]
    prune(tiny("bert"), config={"data_loader": batches, "loss_func": loss, "checkpoint": path})
    with pytest.raises(UserError, match="holds scores of another data"):
        prune(tiny("bert"), config={"data_loader": batches[1:], "loss_func": loss, "checkpoint": path})
    prune(tiny("bert"), config={"data_loader": iter(batches), "loss_func": loss, "checkpoint": path})


def test_gradients_are_taken_under_no_grad():
    expected = prune(tiny("bert"))[1].kept
    with torch.no_grad():
        assert prune(tiny("bert"))[1].kept == expected


@pytest.mark.parametrize("dummy", [{"input_id": tokens()}, torch.ones(1, 64, dtype=torch.long), "abc"])
def test_a_dummy_input_that_does_not_fit_is_one_line(dummy):
    with pytest.raises(
        UserError, match="BertForSequenceClassification does not run with dummy_input"
    ) as said:
        mbp.prune(tiny("bert"), FINE, {"flops": "60%"}, dummy, DATA)
    assert "\n" not in str(said.value)


def test_a_pruned_model_is_pruned_again(tmp_path):
    model, first = prune(tiny("bert"), {"flops": "70%"})
    _, second = prune(model, {"flops": "80%"})
    assert second.sizes_before == first.sizes_after
    mbp.save(model, tmp_path / "twice.safetensors")
    assert torch.equal(
        output(mbp.restore(tiny("bert", seed=2), tmp_path / "twice.safetensors")), output(model)
    )


def test_axes_that_are_skipped_keep_their_size():
    space = mbp.gradnas.get_gradnas_config(axes_to_skip=["*.num_attention_heads"], ffn_hidden_size_divisor=2)
    _, plan = mbp.prune(tiny("bert"), [("gradnas", space)], {"flops": "85%"}, tokens(), DATA)
    smaller = {key for key, size in plan.sizes_after.items() if size < plan.sizes_before[key]}
    assert smaller and all(key.endswith("ffn_hidden_size") for key in smaller)


def test_every_form_of_batch_and_input():
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    expected = prune(tiny("bert"), config={"data_loader": [ids], "loss_func": loss})[1].kept
    first = lambda output, batch: loss(output, ids)
    forms = [
        {"data_loader": [{"input_ids": ids, "attention_mask": mask}], "loss_func": first},
        {"data_loader": [(ids, torch.tensor([0, 1]))], "loss_func": first},
        {"data_loader": [("x", ids)], "loss_func": first, "collect_func": lambda batch: (batch[1], mask)},
        {"data_loader": iter([ids, ids * 0]), "loss_func": first, "max_iter_data_loader": 1},
    ]
    for config in forms:
        assert prune(tiny("bert"), config=config)[1].kept == expected


def bad_loader():
    yield tokens()
    raise OSError("disk gone")


WRONG = {
    "no data": ({"loss_func": loss}, "needs data_loader"),
    "no loss": ({"data_loader": [tokens()]}, "needs loss_func"),
    "no file": ({"checkpoint": "nowhere.safetensors"}, r"needs data_loader \(nowhere"),
    "empty": ({**DATA, "data_loader": []}, "gave no batch"),
    "not iterable": ({**DATA, "data_loader": 3}, "data_loader is int, not an iterable"),
    "loader fails": ({**DATA, "data_loader": bad_loader}, "data_loader is function"),
    "loader dies": ({**DATA, "data_loader": [tokens(), "words"]}, "does not take batch 1 of data_loader"),
    "wrong input": ({**DATA, "data_loader": [{"ids": tokens()}]}, "does not take batch 0 .*collect_func"),
    "collect fails": ({**DATA, "collect_func": lambda b: b["x"]}, "collect_func .* failed"),
    "loss fails": ({**DATA, "loss_func": lambda o, b: o.nothing}, "loss_func .* failed: AttributeError"),
    "loss number": (
        {**DATA, "loss_func": lambda o, b: 1.0},
        "returned float, expected a tensor with one number",
    ),
    "loss vector": ({**DATA, "loss_func": lambda o, b: o[0]}, r"returned a tensor of shape \(2, 2\)"),
    "loss cut off": ({**DATA, "loss_func": lambda o, b: o[0].detach().sum()}, "without gradient"),
    "loss nan": ({**DATA, "loss_func": lambda o, b: o[0].sum() * float("nan")}, "gave nan on batch 0"),
    "loss elsewhere": (
        {**DATA, "loss_func": lambda o, b: torch.ones((), requires_grad=True) * 2},
        "does not depend on layers.0.num_attention_heads",
    ),
    "not callable": ({**DATA, "loss_func": "loss"}, "loss_func is str, not callable"),
    "unknown key": ({**DATA, "loss_fn": loss}, "unknown config key 'loss_fn'.*did you mean 'loss_func'"),
    "iterations": ({**DATA, "max_iter_data_loader": 0}, "max_iter_data_loader=0 must be"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings_are_one_line_and_change_nothing(what):
    config, said = WRONG[what]
    model = tiny("bert")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=said) as caught:
        prune(model, config=config)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_loader_that_dies_is_one_line():
    with pytest.raises(UserError, match="data_loader failed: OSError: disk gone"):
        prune(tiny("bert"), config={**DATA, "data_loader": bad_loader()})


def test_wrong_budgets_and_modes():
    with pytest.raises(UserError, match="reach from"):
        prune(tiny("bert"), {"flops": "3%"})
    with pytest.raises(UserError, match="need a budget"):
        prune(tiny("bert"), {})
    with pytest.raises(UserError, match="dummy_input is needed"):
        mbp.prune(tiny("bert"), FINE, {"flops": "60%"}, None, DATA)
    for space, said in (
        ({"ffn_divisor": 2}, "unknown search-space key 'ffn_divisor'.*ffn_hidden_size_divisor"),
        ({"max_pruning": 1}, "max_pruning=1 is no share"),
        ({"axes_to_skip": "layers.0.*"}, "is no list of names"),
    ):
        with pytest.raises(UserError, match=said):
            mbp.gradnas.get_gradnas_config(**space)
    with pytest.raises(UserError, match="no axis 'layer.0"):
        mbp.prune(
            tiny("bert"), [("gradnas", {"axes_to_skip": ["layer.0.*"]})], {"flops": "60%"}, tokens(), DATA
        )
