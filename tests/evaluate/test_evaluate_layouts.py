"""Pipeline, data and expert parallel ranks find what one rank finds; the first two bit for bit."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
import torch
from distributed.launching import torchrun
from evaluate.conftest import VOCAB, read_json
from models import tokens, write_hf


@pytest.fixture(scope="module")
def results(site):
    """`results[layout]`: what every rank found."""
    write_hf("qwen3_moe", site / "experts", vocab_size=VOCAB)
    torch.save(tokens(7, length=20, vocab=VOCAB), site / "ids.pt")
    layouts.main([str(site)])
    done = torchrun(2, Path(layouts.__file__), site)
    assert done.returncode == 0, done.stdout + done.stderr
    return {"said": done.stdout} | {
        name: torch.load(site / f"{name}.pt", weights_only=False)
        for world in layouts.LAYOUTS.values()
        for name in world
    }


RESULTS = ["losses", "losses one by one", "kl", "kl of 3", "kl undealt", "mmlu", "mmlu shared", "mmlu whole"]


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("layout", ["pp2", "dp2"])
@pytest.mark.parametrize("what", RESULTS)
def test_every_rank_finds_what_one_rank_finds(layout, what, results):
    (single,) = results["single"]
    assert len(results[layout]) == 2
    for found in results[layout]:
        assert same(found[what], single[what])


@pytest.mark.parametrize(("one", "layout"), [("experts", "ep2"), ("single", "tp2")])
@pytest.mark.parametrize("what", RESULTS)
def test_expert_and_tensor_parallel_ranks_find_the_same_but_for_rounding(what, one, layout, results):
    (single,), ranks = results[one], results[layout]
    assert same(ranks[0][what], ranks[1][what])
    if isinstance(single[what], torch.Tensor):
        assert torch.allclose(ranks[0][what], single[what], rtol=1e-4, atol=1e-6)
    else:
        assert ranks[0][what] == single[what]


def test_replicas_of_different_models_score_their_own(results):
    (single,), (first, second) = results["single"], results["dp2"]
    assert torch.equal(second["own"]["losses"], single["losses"])
    assert torch.equal(second["own"]["kl"], single["kl"])
    assert second["own"]["mmlu"] == single["mmlu shared"]
    assert float(first["own"]["kl"].abs().max()) < 2e-6  # the full model itself
    assert not torch.equal(first["own"]["losses"], single["losses"])


def test_only_the_last_stage_holds_the_reference(results):
    assert [found["holds"] for found in results["pp2"]] == [None, 31]
    assert [found["holds"] for found in results["dp2"]] == [31, 31]


def test_a_users_function_counts_on_the_last_stage(results):
    assert [found["last stage"] for found in results["pp2"]] == [8, 8]
    assert [found["last stage"] for found in results["single"]] == [7]


def test_the_command_on_two_stages(results, site):
    """Four layers, and three, on two stages."""
    one, two = (read_json(site / f"{ranks}.json") for ranks in (1, 2))
    assert two["layout"] == {"pp": 2, "ep": 1, "tp": 1, "dp": 1}
    for name in ("loss", "kl"):
        assert one["metrics"][name]["value"] == two["metrics"][name]["value"]
        assert one["metrics"][name]["se"] == two["metrics"][name]["se"]
    assert results["said"].count("perplexity") == 1
