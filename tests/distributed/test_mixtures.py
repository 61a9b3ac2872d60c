"""Mixtures of experts and hybrids: the same scores, cut and model at any layout, expert parallel too."""

from __future__ import annotations

import json

import mixtures
import pytest
import torch
from mixtures import CANDIDATES, CUTS, EXPERTS, LAYOUTS, NOBODYS, SILENT, STRONG, WEAK
from models import difference, run_hf

pytestmark = pytest.mark.timeout(900)  # the first test of a start waits for all of its jobs
CASES = mixtures.cases(LAYOUTS)
STAGES = {  # layers that a stage keeps
    ("pp2", "qwen3_moe"): [2, 2],  # dense layers alone, then mixtures alone
    ("pp2_first", "qwen3_moe"): [1, 3],
    ("pp2", "hybrid"): [3, 3],
    ("pp2_first", "hybrid"): [1, 5],  # Mamba layers alone, then all kinds
}


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_scores_equal_those_of_one_rank(mixed, layout, name):
    """Bit by bit where a pipeline has the same microbatches; experts of two ranks see others together."""
    mine, one = mixed(layout, name), mixed("single", name)
    assert mine.meta == one.meta
    got, want = mine.scores, one.scores
    assert got.keys() == want.keys()
    worst = {key: difference(got[key], scores) for key, scores in want.items()}
    bound = 1e-6 if LAYOUTS[layout].dp > 1 else 0
    assert {key: value for key, value in worst.items() if not value <= bound} == {}
    assert [key for key in want if mine.order(key, one.plan) != one.order(key, one.plan)] == []


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_units_are_kept_and_the_export_is_bit_identical(mixed, layout, name):
    mine, one = mixed(layout, name), mixed("single", name)
    plans = [{k: v for k, v in r.plan.items() if k != "layer_scores"} for r in (mine, one)]
    assert plans[0] == plans[1]
    assert mine.weights.keys() == one.weights.keys()
    assert [n for n, w in one.weights.items() if not torch.equal(mine.weights[n], w)] == []
    configs = [json.loads((r.folder / "hf" / "config.json").read_text()) for r in (mine, one)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_pruned_model_runs_in_process_like_its_export(mixed_site, mixed, layout, name):
    """Every data- or expert-parallel rank on its own prompts."""
    mine, dp = mixed(layout, name), LAYOUTS[layout].dp
    want = run_hf(mine.exported(), torch.load(mixed_site / "prompts.pt"))
    for rank in range(dp):
        assert difference(mine.logits(rank), want[rank::dp]) <= 1e-5


@pytest.mark.parametrize("name", CUTS)
def test_sizes_and_layers_are_those_wanted(mixed, name):
    plan = mixed("single", name).plan
    assert {hparam: plan["sizes_after"][hparam] for hparam in CUTS[name].sizes} == CUTS[name].sizes
    if "num_layers" in CUTS[name].sizes:
        assert not set(WEAK) & set(plan["layers_kept"])


@pytest.mark.parametrize(("layout", "name"), STAGES)
def test_layers_a_stage_keeps(mixed, layout, name):
    assert mixed(layout, name).stages == STAGES[layout, name]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_separate"])
def test_experts_of_one_rank_are_all_that_is_kept(mixed, name):
    """So that half of them really move to the other rank."""
    kept = mixed("ep2", name).plan["kept"]
    for layer in (3, 4, 5):
        assert sorted(kept[f"layers.{layer}.num_moe_experts"][0]) == sorted(STRONG[layer % 3])


def test_routing_groups_keep_experts_of_one_rank(mixed):
    """The middle group of three lies on both ranks, and the second rank's share of it goes to the first."""
    kept = mixed("ep2", "deepseek_v3").plan["kept"]
    each = EXPERTS // 3
    for layer in (2, 3, 5):
        groups = kept[f"layers.{layer}.num_moe_experts"]
        assert [len(group) for group in groups] == [2, 2, 2]
    assert {each + place for place in kept["layers.3.num_moe_experts"][1]} == {6, 7}


@pytest.mark.parametrize("layout", ["pp2", "ep2", "dp2"])
@pytest.mark.parametrize("name", SILENT)
def test_an_expert_without_tokens_is_known_and_goes(mixed, layout, name):
    mine = mixed(layout, name)
    assert mine.meta["experts_without_tokens"] == {"layers.3": [NOBODYS]}
    groups = mine.plan["kept"]["layers.3.num_moe_experts"]
    each = EXPERTS // len(groups)
    assert NOBODYS not in [group * each + place for group, kept in enumerate(groups) for place in kept]


@pytest.mark.parametrize("name", [name for name in CUTS if f"{name}_separate" in CUTS])
def test_separate_experts_are_cut_like_grouped_ones(mixed, name):
    grouped, separate = mixed("ep2", name).weights, mixed("ep2", f"{name}_separate").weights
    assert grouped.keys() == separate.keys()
    assert [n for n, w in grouped.items() if not torch.equal(separate[n], w)] == []


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_is_what_shrink_makes_and_leaves_the_model_whole(mixed, name):
    mine = mixed("candidate", name)
    said = json.loads((mine.folder / "result.json").read_text())
    assert said["lost"] == [[], []]
    assert said["watched"] > 1000
    for rank in range(2):
        selected, shrunk = mine.logits(rank, "selected"), mine.logits(rank)
        assert difference(selected, shrunk) <= 1e-6
        assert difference(shrunk, mixed("ep2", name).logits(rank)) <= 1e-5
        assert torch.equal(mine.logits(rank, "again"), mine.logits(rank, "full"))
        assert difference(mine.logits(rank, "full"), shrunk) > 1e-2


def test_what_the_layers_of_one_stage_cannot_have_is_refused_on_every_rank(mixed):
    said = mixed("refused_by_one_stage", "qwen3_moe").folder / "result.json"
    reason = "num_moe_experts=3 is too few for moe_router_topk=4; smallest choice: 4"
    assert json.loads(said.read_text())["refused"] == [reason, reason]
