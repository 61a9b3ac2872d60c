"""Mixtures of experts and hybrids: the same scores, cut and model at any layout, expert parallel too."""

from __future__ import annotations

import json

import mixtures
import pytest
import torch
from models import difference, load_hf, run_hf
from transformers import AutoModelForCausalLM

CASES = [(layout, name) for layout, of in mixtures.LAYOUTS.items() if layout != "single" for name in of.cuts]


def exported(result, name):
    """The Hugging Face model that a job left."""
    if not mixtures.CUTS[name].model.startswith("hybrid"):
        return load_hf(result.folder / "hf")
    return AutoModelForCausalLM.from_pretrained(
        result.folder / "hf", trust_remote_code=True, dtype=torch.float32
    ).eval()


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_scores_equal_those_of_one_rank(mixed, layout, name):
    mine, one = mixed(layout, name), mixed("single", name)
    assert mine.meta == one.meta
    assert mine.scores.keys() == one.scores.keys()
    for key, scores in one.scores.items():
        torch.testing.assert_close(
            mine.scores[key], scores, rtol=1e-6, atol=0, msg=lambda m, k=key: f"{k}: {m}"
        )
        assert torch.equal(mine.scores[key].argsort(stable=True), scores.argsort(stable=True)), key


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_units_are_kept_and_the_export_is_bit_identical(mixed, layout, name):
    mine, one = mixed(layout, name), mixed("single", name)
    assert mine.plan == one.plan
    assert mine.weights.keys() == one.weights.keys()
    assert [n for n, w in one.weights.items() if not torch.equal(mine.weights[n], w)] == []
    configs = [json.loads((r.folder / "hf" / "config.json").read_text()) for r in (mine, one)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_pruned_model_runs_in_process_like_its_export(mixed_site, mixed, layout, name):
    prompts, mine = torch.load(mixed_site / "prompts.pt"), mixed(layout, name)
    want = run_hf(exported(mine, name), prompts)
    dp = mixtures.LAYOUTS[layout].dp
    for rank in range(dp):
        assert difference(mine.logits(rank), want[rank::dp]) <= 1e-5
