"""A repaired cut on two pipeline stages and on two data-parallel ranks: what one rank makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.conftest import EVERYTHING, Result, do
from models import tokens

SAMPLES = 160  # of 12 tokens: 20 for each of the 64 FFN channels that stay
RUNS = {
    "single": ("least_squares", 1),
    "pp2": ("least_squares", 2),
    "dp2": ("least_squares", 1),
    "walked_single": ("sequential", 1),
    "walked_dp2": ("sequential", 1),
}
"""The repair and the pipeline stages; what ends in 2 runs on two ranks."""
PAIRS = [("single", "pp2"), ("single", "dp2"), ("walked_single", "walked_dp2")]


@pytest.fixture(scope="module")
def repaired(site: Path, job) -> dict[str, Result]:
    np.save(site / "much.npy", tokens(SAMPLES, seed=19).numpy())

    def one(name: str) -> dict:
        kind, stages = RUNS[name]
        repair = {"repair": kind, "repair_memory_gb": 0.0001, "importance": "weighted"}
        made = job(f"repaired_{name}", "all", "untied", EVERYTHING, {}, stages, prune=repair)
        return {**made, "tokens": str(site / "much.npy"), "samples": SAMPLES, "megatron": False}

    two = [name for name in RUNS if name.endswith("2")]
    do([one(name) for name in RUNS if name not in two], 1, site / "repaired1.json")
    do([one(name) for name in two], 2, site / "repaired2.json")
    return {name: Result(site / f"repaired_{name}" / "all") for name in RUNS}


@pytest.mark.parametrize(("single", "layout"), PAIRS)
def test_the_same_weights(repaired, single, layout):
    one, two = repaired[single], repaired[layout]
    assert sum(record["repaired"] for record in one.plan["repaired"]) > 12
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        if layout == "pp2":
            assert torch.equal(tensor, two.weights[name]), name
        else:
            torch.testing.assert_close(two.weights[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("single", "layout"), PAIRS)
def test_the_same_records(repaired, single, layout):
    one, two = (
        {(r["weight"], r.get("target")): r for r in repaired[name].plan["repaired"]}
        for name in (single, layout)
    )
    assert one.keys() == two.keys()
    for name, record in one.items():
        assert record.keys() == two[name].keys()
        assert (record["tokens"], record["repaired"]) == (two[name]["tokens"], two[name]["repaired"])
        assert two[name]["repaired_error"] == pytest.approx(record["repaired_error"], rel=1e-5)
