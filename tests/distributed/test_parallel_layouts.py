"""The same scores, the same cut and the same model, however many ranks work on it."""

from __future__ import annotations

import json

import pytest
import torch
from jobs import reloaded, work
from models import difference, load_hf, run, run_hf

CASES = [
    ("pp2", "untied"), ("pp2", "tied"), ("pp2", "five"),
    ("pp2_first2", "untied"), ("pp2_first2", "tied"), ("pp2_first2", "weak_first"), ("pp2_last1", "tied"),
    ("dp2", "untied"), ("dp2", "tied"),
    ("pp3", "untied"), ("pp3", "tied"), ("pp3", "weak_first"), ("pp3", "weak_last"),
]  # fmt: skip
STAGES = {  # layers a stage keeps: uneven ones, and stages that lose every layer
    ("pp2", "untied"): [2, 2], ("pp2", "five"): [2, 3], ("pp2_first2", "untied"): [2, 2],
    ("pp2_first2", "weak_first"): [0, 4], ("pp2_last1", "tied"): [3, 1],
    ("pp3", "untied"): [2, 0, 2], ("pp3", "tied"): [2, 0, 2], ("pp3", "weak_first"): [0, 2, 2],
    ("pp3", "weak_last"): [2, 2, 0],
}  # fmt: skip


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_scores_equal_those_of_one_rank(result, layout, name):
    mine, one = result(layout, name).scores, result("single", name).scores
    assert mine.keys() == one.keys()
    for key, scores in one.items():
        torch.testing.assert_close(mine[key], scores, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
        assert torch.equal(mine[key].argsort(dim=-1, stable=True), scores.argsort(dim=-1, stable=True)), key


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_units_are_kept_and_the_export_is_bit_identical(result, layout, name):
    mine, one = result(layout, name), result("single", name)
    for key in ("layers_kept", "kept", "sizes_after", "params_before", "params_after", "fingerprint"):
        assert mine.plan[key] == one.plan[key], key
    assert mine.weights.keys() == one.weights.keys()
    assert all(torch.equal(mine.weights[n], w) for n, w in one.weights.items())
    configs = [json.loads((r.folder / "hf" / "config.json").read_text()) for r in (mine, one)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_pruned_model_runs_in_process_like_its_export(site, result, layout, name):
    """Also where the cut left an uneven pipeline, or a stage without layers."""
    prompts = torch.load(site / "prompts.pt")
    want = run_hf(load_hf(result(layout, name).folder / "hf"), prompts)
    ranks = 2 if layout == "dp2" else 1
    for rank in range(ranks):
        assert difference(result(layout, name).logits(rank), want[rank::ranks]) <= 1e-5


@pytest.mark.parametrize(("layout", "name"), STAGES)
def test_layers_a_stage_keeps(result, layout, name):
    assert result(layout, name).stages == STAGES[layout, name]


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_scores_of_two_stages_serve_one_rank_without_a_forward_pass(site, job, result, name, monkeypatch):
    monkeypatch.setattr("mbridge_prune.importance.collector.Collector.__enter__", _no_pass)
    scores = result("pp2", name).folder / "scores.safetensors"
    before = scores.read_bytes()
    sizes = result("pp2", name).plan["sizes_after"]
    work(job("reused", name, name, sizes, {}, 1, score=False, scores=str(scores)))
    mine = type(result("pp2", name))(site / "reused" / name)
    assert all(torch.equal(mine.weights[n], w) for n, w in result("pp2", name).weights.items())
    assert scores.read_bytes() == before


def _no_pass(collector):
    raise AssertionError("a forward pass was about to run")


@pytest.mark.parametrize("name", ["untied", "tied", "five"])
def test_a_megatron_checkpoint_of_two_stages_loads_on_one(site, result, name):
    mine = result("pp2", name)
    prompts = torch.load(site / "prompts.pt")
    model = reloaded({"megatron": str(mine.folder / "megatron")})
    assert difference(run(model, prompts), run_hf(load_hf(mine.folder / "hf"), prompts)) <= 1e-5
