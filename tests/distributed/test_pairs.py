"""Every family times every hparam on two pipeline stages and on two expert-parallel ranks.

What one rank makes of each pair is proved in tests/mcore; here two ranks make the same of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.conftest import Result, do, write_texts
from matrix import EXPERT_NAMES, FAMILIES, config_of, cuts, full_sizes, write_source
from mixtures import Cut, Layout, job
from models import FAMILIES as DENSE
from models import difference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # the first test waits for all jobs
EXPERTS, KEPT = 12, 6  # they divide over the ranks and into routing groups
ALL = (*DENSE, *FAMILIES)
MIXTURES = [family for family in ALL if "num_moe_experts" in cuts(family)]
LAYOUTS = {"single": Layout(1, ALL), "pp2": Layout(2, ALL, pp=2), "ep2": Layout(2, MIXTURES, ep=2)}
CASES = [
    (layout, family, name)
    for layout, of in LAYOUTS.items()
    for family in of.cuts
    for name in cuts(family)
    if layout != "single"
]


def experts(family: str) -> dict[str, int]:
    """The change that gives a mixture EXPERTS experts, under its config's own name for them."""
    text = config_of(family).get_text_config()
    return {name: EXPERTS for name in EXPERT_NAMES if getattr(text, name, None) and family in MIXTURES}


def jobs(site: Path, layout: str) -> list[dict[str, Any]]:
    """The first job of a family scores it, the others read those scores."""
    found, of = [], LAYOUTS[layout]
    for family in of.cuts:
        layers = full_sizes(config_of(family))["num_layers"]
        uneven = {"num_layers_in_first_pipeline_stage": layers // 2} if of.pp > 1 and layers % 2 else {}
        for name, sizes in cuts(family).items():
            sizes = {**sizes, **({"num_moe_experts": KEPT} if "num_moe_experts" in sizes else {})}
            more = {
                "grouped": name != "all_separate", "trust": True, "overrides": uneven,
                "scores": str(site / layout / f"{family}.safetensors"),
            }  # fmt: skip
            found.append(job(site / layout / f"{family}-{name}", of, Cut(family, sizes, more)))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(layout, family, name)`: what a job left."""
    site = tmp_path_factory.mktemp("pairs")
    write_texts(site)
    for family in ALL:
        write_source(family, site / "models" / family, **experts(family))
    for layout, of in LAYOUTS.items():
        (site / layout).mkdir()
        do(jobs(site, layout), of.ranks, site / f"{layout}.json")
    return lambda layout, family, name: Result(site / layout / f"{family}-{name}")


@pytest.mark.parametrize(("layout", "family", "name"), CASES, ids="-".join)
def test_two_ranks_make_what_one_makes(made, layout, family, name):
    mine, one = made(layout, family, name), made("single", family, name)
    plans = [{k: v for k, v in r.plan.items() if k != "layer_scores"} for r in (mine, one)]
    assert plans[0] == plans[1]
    configs = [json.loads((r.folder / "hf" / "config.json").read_text()) for r in (mine, one)]
    assert configs[0] == configs[1]
    assert mine.weights.keys() == one.weights.keys()
    assert [n for n, w in one.weights.items() if not torch.equal(mine.weights[n], w)] == []
    for rank in range(LAYOUTS[layout].dp):
        assert difference(mine.logits(rank), one.logits()[rank :: LAYOUTS[layout].dp]) <= 1e-5
