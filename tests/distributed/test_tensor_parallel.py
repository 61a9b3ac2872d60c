"""Tensor-parallel ranks score what one rank then cuts, without a forward pass of its own."""

from __future__ import annotations

import json

import mixtures
import pytest
import shards
import torch
from jobs import work
from mixtures import Layout
from models import difference

pytestmark = pytest.mark.timeout(900)  # the first test of a start waits for all of its jobs
CASES = mixtures.cases(shards.LAYOUTS)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_scores_equal_those_of_one_rank(mixed, layout, name):
    """To rounding: a product over a row of the weight is a sum of two ranks' products."""
    mine, one = mixed(layout, name), mixed("single", name)
    assert mine.meta == one.meta
    got, want = mine.scores, one.scores
    assert got.keys() == want.keys()
    worst = {key: difference(got[key], scores) for key, scores in want.items()}
    assert {key: value for key, value in worst.items() if not value <= 1e-5} == {}
    assert [key for key in want if mine.order(key, one.plan) != one.order(key, one.plan)] == []


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_one_rank_cuts_from_them_without_a_forward_pass(mixed_site, mixed, layout, name, monkeypatch):
    monkeypatch.setattr("mbridge_prune.importance.collector.Collector.__enter__", _no_pass)
    scores = mixed(layout, name).folder / "scores.safetensors"
    before, one = scores.read_bytes(), mixed("single", name)
    job = mixtures.job(mixed_site / f"after_{layout}" / name, Layout(1, ()), shards.CUTS[name])
    work({**job, "score": False, "scores": str(scores), "megatron": False})
    mine = type(one)(mixed_site / f"after_{layout}" / name)
    assert mine.plan["kept"] == one.plan["kept"]
    assert mine.weights.keys() == one.weights.keys()
    assert [n for n, w in one.weights.items() if not torch.equal(mine.weights[n], w)] == []
    assert scores.read_bytes() == before


def _no_pass(collector):
    raise AssertionError("a forward pass was about to run")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "prune",
            "tensor_model_parallel_size=2 is not supported for pruning; score with it (score(), --score-only)",
        ),
        ("norm_of_all_heads", "QK norm spans the heads of all tensor-parallel ranks; score the model with"),
    ],
)
def test_what_two_ranks_cannot_do_is_refused_on_both(mixed, name, reason):
    said = json.loads((mixed("refused", name).folder / "result.json").read_text())["refused"]
    assert [reason in error for error in said] == [True, True], said
