"""Megatron checkpoints of pruned models: written by some ranks, read by others."""

from __future__ import annotations

import pytest
import shards
import torch
from jobs import reloaded
from mixtures import CHECKPOINTS
from models import difference, run, run_hf

pytestmark = pytest.mark.timeout(900)  # the first test of a start waits for all of its jobs


@pytest.mark.parametrize(
    ("layout", "name"),
    [(layout, name) for layout in ("pp2", "ep2") for name in CHECKPOINTS]
    + [("single", name) for name in shards.SAVED],
)
def test_one_rank_reads_it(mixed_site, mixed, layout, name):
    mine, prompts = mixed(layout, name), torch.load(mixed_site / "prompts.pt")
    saved = {"megatron": str(mine.folder / "megatron"), "trust": True}
    assert difference(run(reloaded(saved), prompts), run_hf(mine.exported(), prompts)) <= 1e-5


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_expert_parallel_ranks_read_that_of_one(mixed_site, mixed, name):
    want = run_hf(mixed("single", name).exported(), torch.load(mixed_site / "prompts.pt"))
    for rank in range(2):
        assert difference(mixed("reloaded", name).logits(rank), want[rank::2]) <= 1e-5
