"""Megatron checkpoints of pruned models: written by some ranks, read by others."""

from __future__ import annotations

import shutil

import pytest
import shards
import torch
from distributed.conftest import Result, do
from jobs import reloaded
from mixtures import CHECKPOINTS
from models import difference, run, run_hf

pytestmark = pytest.mark.timeout(900)  # the first test of a start waits for all of its jobs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout in ("pp2", "ep2") for name in CHECKPOINTS]
    + [("single", name) for name in shards.SAVED],
)
def test_one_rank_reads_it(mixed_site, mixed, layout, name):
    mine, prompts = mixed(layout, name), torch.load(mixed_site / "prompts.pt")
    saved = {"megatron": str(mine.folder / "megatron"), "trust": True}
    assert difference(run(reloaded(saved), prompts), run_hf(mine.exported(), prompts)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_expert_parallel_ranks_read_that_of_one(mixed_site, mixed, name):
    want = run_hf(mixed("single", name).exported(), torch.load(mixed_site / "prompts.pt"))
    for rank in range(2):
        assert difference(mixed("reloaded", name).logits(rank), want[rank::2]) <= 1e-5


@pytest.fixture(scope="module")
def spread_out(site, result):
    """A checkpoint of a cut on two stages (moved since), read and exported by two ranks at other layouts."""
    jobs = []
    for name in ("untied", "tied"):
        shutil.copytree(result("pp2", name).folder / "megatron", site / "spread" / name)
        for layout in LAYOUTS:
            for kind in ("reload", "export"):
                out = site / "spread" / f"{name}-{'-'.join(layout)}"
                jobs.append({"kind": kind, "megatron": str(site / "spread" / name), "out": str(out),
                             "prompts": str(site / "prompts.pt"), "pp": 1, **layout})  # fmt: skip
    do(jobs, 2, site / "spread.json")
    return site / "spread"


LAYOUTS = ({"tp": 2}, {"pp": 2})


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_it_loads_at_another_layout_and_comes_back_the_same(site, spread_out, result, name, layout):
    mine, prompts = result("pp2", name), torch.load(site / "prompts.pt")
    found = Result(spread_out / f"{name}-{'-'.join(layout)}")
    assert difference(found.logits(), run_hf(mine.exported(), prompts)) <= 1e-5
    for file in ("model.safetensors", "config.json"):
        assert (found.folder / "hf" / file).read_bytes() == (mine.folder / "hf" / file).read_bytes()
