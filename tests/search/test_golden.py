"""A fixed small hybrid model (Mamba, attention, dense and expert layers): the very grid, counts and order."""

from __future__ import annotations

import itertools

import pytest
import torch
from nemotron_h import NemotronHForCausalLM, nemotron_h_config, write_nemotron_h

import mbridge_prune as mbp
from mbridge_prune.dry_run import check_target
from mbridge_prune.mcore_minitron import table_of
from mbridge_prune.search.candidates import inside_budget
from mbridge_prune.search.costs import Costs, Serving
from mbridge_prune.search.reach import least_cost
from mbridge_prune.search.space import Space

ORDER = (0, 1, 2, 4, 5, 3)  # most important first
STEPS = {
    "hidden_size_divisor": 16,
    "ffn_hidden_size_divisor": 16,
    "mamba_head_dim_divisor": 4,
    "num_moe_experts_divisor": 2,
    "num_layers_divisor": 1,
}
NAMES = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "num_moe_experts": "n_routed_experts",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid") / "model"
    write_nemotron_h(path, "M-M*ME")
    return path


@pytest.fixture(scope="module")
def hybrid(folder):
    """(table, space, costs)"""
    loaded = mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=folder, provider_overrides={"seq_length": 16}, trust_remote_code=True
    )
    table = table_of(loaded.unwrapped_model)
    space = Space.of(table, ORDER, STEPS)
    return (
        table,
        space,
        Costs(table, list(ORDER), Serving(batch_size=1, seq_length=16, kv_dtype=torch.bfloat16), 4),
    )


def test_the_grid(hybrid):
    _, space, _ = hybrid
    assert space.choices == {
        "hidden_size": [48, 64],
        "mamba_num_heads": [6, 8],
        "mamba_head_dim": [8, 12],
        "ffn_hidden_size": [64, 80, 96],
        "num_query_groups": [2],
        "num_attention_heads": [6, 8],
        "num_moe_experts": [6, 8],
        "moe_ffn_hidden_size": [32],
        "moe_shared_expert_intermediate_size": [32, 48],
        "num_layers": [5, 6],
    }
    assert space.size() == 384
    # Five layers are those without the only attention layer: both numbers of heads are one network.
    assert sum(len(chunk["num_layers"]) for chunk in space.grid()) == 384 - 192 // 2


@pytest.mark.parametrize(
    "sizes, params",
    [
        ({}, 154_280),
        ({"hidden_size": 48, "ffn_hidden_size": 80, "num_layers": 5}, 99_336),
        ({"mamba_num_heads": 6, "mamba_head_dim": 8, "num_moe_experts": 6}, 117_046),
        ({"hidden_size": 48, "num_attention_heads": 6, "moe_shared_expert_intermediate_size": 32}, 111_672),
    ],
)
def test_counts_are_those_of_the_cut_model_in_transformers(hybrid, sizes, params):
    """Fixed numbers, and those of transformers' class built from a config of these sizes."""
    _, _, costs = hybrid
    pattern = "M-MME" if "num_layers" in sizes else "M-M*ME"
    changes = {NAMES[hparam]: size for hparam, size in sizes.items() if hparam in NAMES}
    with torch.device("meta"):
        counted = NemotronHForCausalLM(nemotron_h_config(pattern, **changes)).num_parameters()
    assert int(costs.params(sizes)) == counted == params


def test_the_order_of_candidates(hybrid):
    table, space, costs = hybrid
    limits = {"params": 0.7 * costs.params({})}

    def share_that_goes(grid):
        return sum(1.0 - grid[hparam] / grid[hparam].max() for hparam in grid)

    found = inside_budget(space, costs, limits, share_that_goes)
    assert (found.grid, found.inside) == (288, 151)
    full = table.hparams()
    cuts = [{h: s for h, s in found.sizes(place).items() if s != full[h]} for place in range(3)]
    assert cuts == [
        {"hidden_size": 48, "num_layers": 5},
        {"hidden_size": 48, "mamba_num_heads": 6},
        {"hidden_size": 48, "ffn_hidden_size": 80, "num_layers": 5},
    ]


@pytest.mark.parametrize("budget", ["params", "active_params", "memory_mb", "flops"])
def test_the_least_cost_is_that_of_the_best_order_of_layers(hybrid, budget):
    """Against every set of three layers, counted one by one; Mamba, attention and experts cost unlike things."""
    table, space, _ = hybrid
    sizes = table.settle({**space.smallest(), "num_layers": 3})
    serving = Serving(batch_size=64, seq_length=4096, kv_dtype=torch.bfloat16)
    count = lambda order: Costs(table, order, serving, 4)
    sets = itertools.combinations(range(6), 3)
    true = min(float(count([*s, *(set(range(6)) - set(s))]).of(budget, sizes)) for s in sets)
    assert least_cost(count(range(6)), budget, sizes) == pytest.approx(true, rel=1e-12)


def test_a_reachable_budget_of_a_hybrid_is_not_refused(hybrid, folder):
    """With a large cache the layers with the most parameters are not those that cost memory."""
    table, _, _ = hybrid
    serving = {"batch_size": 64, "seq_length": 4096}
    settings = {"serving": serving, "max_depth_pruning": 0.5, "max_width_pruning": 0.01}
    costs = Costs(table, [0, 1, 2, 4, 5, 3], Serving(**serving), 4)  # attention is the first to go
    full = table.hparams()
    limit = float(costs.memory_mb({**full, "num_layers": 3})) * 1.01
    provider = check_target(folder, {}, search=({"memory_mb": limit}, settings), trust_remote_code=True,
                            divisors={"num_layers_divisor": 1})  # fmt: skip
    assert provider.num_layers == 6
