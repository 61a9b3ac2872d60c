"""A repaired cut on pipeline stages and on data-parallel ranks: what one rank makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from distributed.conftest import EVERYTHING, FIRST2, Result, do
from models import tokens

SAMPLES = 160  # of 12 tokens: 20 for each of the 64 FFN channels that stay


class Run(NamedTuple):
    repair: str
    model: str = "untied"
    """Of "untied", layers 2 and 3 go: with stages of three layers, a gap over the boundary."""
    stages: int = 1
    ranks: int = 1
    overrides: dict[str, int] = {}


RUNS = {
    "single": Run("least_squares"),
    "pp2": Run("least_squares", stages=2, ranks=2),
    "dp2": Run("least_squares", ranks=2),
    "walked_single": Run("sequential"),
    "walked_first_single": Run("sequential", "weak_first"),
    "walked_last_single": Run("sequential", "weak_last"),
    "walked_pp2": Run("sequential", stages=2, ranks=2),
    "walked_dp2": Run("sequential", ranks=2),
    "walked_first_pp2": Run("sequential", "weak_first", 2, 2, FIRST2),
    "walked_pp3": Run("sequential", stages=3, ranks=3),
    "walked_last_pp3": Run("sequential", "weak_last", 3, 3),
}
PAIRS = [
    ("single", "pp2"),
    ("single", "dp2"),
    ("walked_single", "walked_pp2"),
    ("walked_single", "walked_dp2"),
    ("walked_first_single", "walked_first_pp2"),  # its first stage keeps no layer
    pytest.param("walked_single", "walked_pp3", marks=pytest.mark.slow),  # nor does the middle one
    pytest.param("walked_last_single", "walked_last_pp3", marks=pytest.mark.slow),  # nor the last
]


@pytest.fixture(scope="module")
def repaired(site: Path, job):
    """`repaired(run)`; runs on as many ranks share one start."""
    np.save(site / "much.npy", tokens(SAMPLES, seed=19).numpy())
    started: set[int] = set()

    def made(name: str) -> dict[str, Any]:
        run = RUNS[name]
        repair = {"repair": run.repair, "repair_memory_gb": 0.0001, "importance": "weighted"}
        made = job(f"repaired_{name}", "all", run.model, EVERYTHING, run.overrides, run.stages, prune=repair)
        return {**made, "tokens": str(site / "much.npy"), "samples": SAMPLES, "megatron": False}

    def get(name: str) -> Result:
        ranks = RUNS[name].ranks
        if ranks not in started:
            started.add(ranks)
            jobs = [made(each) for each, run in RUNS.items() if run.ranks == ranks]
            do(jobs, ranks, site / f"repaired{ranks}.json")
        return Result(site / f"repaired_{name}" / "all")

    return get


@pytest.mark.parametrize(("single", "layout"), PAIRS)
def test_the_same_weights(repaired, single, layout):
    one, two = repaired(single), repaired(layout)
    assert sum(record["repaired"] for record in one.plan["repaired"]) > 12
    if single == "single":
        (taken,) = [r for r in one.plan["repaired"] if r.get("target") == "removed_layers"]
        assert taken["repaired"] and taken["weight"] == "layers.1.mlp.linear_fc2"
    assert one.plan["layers_kept"] == two.plan["layers_kept"]
    assert one.weights.keys() == two.weights.keys()
    for name, tensor in one.weights.items():
        if layout.endswith("dp2"):
            torch.testing.assert_close(two.weights[name], tensor, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, two.weights[name]), name


@pytest.mark.parametrize(("single", "layout"), PAIRS)
def test_the_same_records(repaired, single, layout):
    one, two = (
        {(r["weight"], r.get("target")): r for r in repaired(name).plan["repaired"]}
        for name in (single, layout)
    )
    assert one.keys() == two.keys()
    for name, record in one.items():
        assert record.keys() == two[name].keys()
        assert (record["tokens"], record["repaired"]) == (two[name]["tokens"], two[name]["repaired"])
        assert two[name]["repaired_error"] == pytest.approx(record["repaired_error"], rel=1e-5)
