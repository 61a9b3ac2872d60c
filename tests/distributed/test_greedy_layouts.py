"""Greedy depth on two pipeline stages and on two data-parallel ranks: the order that one rank finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.conftest import Result, do

STAGES = {"single": 1, "pp2": 2, "dp2": 1}


@pytest.fixture(scope="module")
def ranked(site: Path, job) -> dict[str, Result]:
    def one(name: str) -> dict:
        depth = {"depth": "greedy"}
        made = job(f"greedy_{name}", "all", "untied", {"num_layers": 3}, {}, STAGES[name], prune=depth)
        return {**made, "megatron": False}

    do([one("single")], 1, site / "greedy1.json")
    do([one("pp2"), one("dp2")], 2, site / "greedy2.json")
    return {name: Result(site / f"greedy_{name}" / "all") for name in STAGES}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2", "dp2"])
def test_the_same_layers_go_in_the_same_order(ranked, layout):
    one, two = (torch.tensor(ranked[name].plan["layer_scores"]) for name in ("single", layout))
    assert ranked[layout].plan["layers_kept"] == ranked["single"].plan["layers_kept"]
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)
    assert torch.equal(two.argsort(), one.argsort())
