"""Weighted ranking and least squares of mixtures and hybrids at every layout: what one rank makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from distributed.conftest import Result, do
from mixtures import CUTS, LAYOUTS, Cut, job
from models import difference, tokens

pytestmark = pytest.mark.timeout(900)
SAMPLES, LENGTH = 360, 12  # enough for the 20 channels of each expert, and for the 48 inputs of most
NAMES = ("deepseek_v3", "hybrid_separate")
WORK = [("pp2", "hybrid_separate"), ("ep2", "deepseek_v3"), ("ep2", "hybrid_separate"), ("dp2", "deepseek_v3"),
        ("pp2_ep2", "deepseek_v3"), ("dp4_ep2", "hybrid_separate")]  # fmt: skip
CASES = [pytest.param(*work, marks=[pytest.mark.slow] * (LAYOUTS[work[0]].ranks > 2)) for work in WORK]
MADE = {"importance": "weighted", "repair": "least_squares", "repair_memory_gb": 0.002}


@pytest.fixture(scope="module")
def made(mixed_site: Path):
    """`made(layout, name)`: its result; layouts of as many ranks share a start."""
    np.save(mixed_site / "much.npy", tokens(SAMPLES, seed=19, length=LENGTH).numpy())
    started: set[int] = set()

    def folder(layout: str, name: str) -> Path:
        return mixed_site / f"repaired_{layout}" / name

    def one(layout: str, name: str) -> dict:
        cut = CUTS[name]
        more = {**cut.more, "megatron": False, "prune": MADE, "samples": SAMPLES, "micro_batch": 10}
        wanted = job(folder(layout, name), LAYOUTS[layout], Cut(cut.model, cut.sizes, more))
        return {**wanted, "tokens": str(mixed_site / "much.npy")}

    def get(layout: str, name: str) -> Result:
        ranks = LAYOUTS[layout].ranks
        if ranks not in started:
            started.add(ranks)
            work = [("single", each) for each in NAMES] + WORK
            jobs = [one(*each) for each in work if LAYOUTS[each[0]].ranks == ranks]
            do(jobs, ranks, mixed_site / f"repaired{ranks}.json")
        return Result(folder(layout, name))

    return get


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_scores(made, layout, name):
    one, many = made("single", name), made(layout, name)
    assert one.scores.keys() == many.scores.keys()
    bound = 0 if layout == "pp2" else 1e-6
    worst = {key: difference(many.scores[key], scores) for key, scores in one.scores.items()}
    assert {key: value for key, value in worst.items() if not value <= bound} == {}
    assert one.plan["kept"] == many.plan["kept"]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_weights(made, layout, name):
    one, many = made("single", name).weights, made(layout, name).weights
    assert one.keys() == many.keys()
    for key, tensor in one.items():
        if layout == "pp2":
            assert torch.equal(many[key], tensor), key
        else:
            torch.testing.assert_close(
                many[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_records(made, layout, name):
    one, many = ({r["weight"]: r for r in made(each, name).plan["repaired"]} for each in ("single", layout))
    assert one.keys() == many.keys()
    for key, record in one.items():
        assert record.keys() == many[key].keys(), key
        for what, value in record.items():
            close = isinstance(value, float)
            assert many[key][what] == (pytest.approx(value, rel=1e-4) if close else value), (key, what)


@pytest.mark.parametrize("name", NAMES)
def test_experts_are_fitted_where_they_see_enough(made, name):
    records = made("single", name).plan["repaired"]
    experts = [record for record in records if ".experts." in record["weight"]]
    done = [record["weight"].rpartition(".")[2] for record in experts if record["repaired"]]
    assert {"linear_fc1", "linear_fc2"} == set(done)
    if name == "hybrid_separate":
        assert any("calibration tokens" in record.get("why", "") for record in experts)
        assert any(r["repaired"] for r in records if r["weight"].endswith("out_proj"))
