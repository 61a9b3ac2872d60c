"""Costs of candidates against models that were really cut, and against formulas written out by hand."""

from __future__ import annotations

import time

import matrix
import numpy as np
import pytest
import torch
from models import cut, load

from mbridge_prune import UserError
from mbridge_prune.mcore_minitron import table_of
from mbridge_prune.search.budget import BUDGETS
from mbridge_prune.search.candidates import inside_budget
from mbridge_prune.search.costs import Costs, Serving
from mbridge_prune.search.space import Space

SERVING = Serving(batch_size=3, seq_length=10, kv_dtype=torch.float16)
STEPS = {"hidden_size_divisor": 8, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1}


def costs_of(folder, order=(0, 1, 2, 3), **options):
    table = table_of(load(folder, **options).unwrapped_model)
    return table, Costs(table, list(order), SERVING, 4)


def test_parameters_are_those_of_the_cut_model(hf_folder):
    table, costs = costs_of(hf_folder("qwen3_moe_mixed"))
    sizes = {"num_moe_experts": 6, "moe_ffn_hidden_size": 16, "hidden_size": 48}
    plan = cut(table.model, sizes)
    assert costs.params(sizes) == plan.params_after and costs.active_params(sizes) == plan.active_after


def test_memory_of_weights_and_key_value_cache(hf_folder):
    _, costs = costs_of(hf_folder("llama"))
    sizes = {"num_attention_heads": 4, "num_query_groups": 1, "num_layers": 3}
    cache = 3 * 10 * 3 * 2 * 1 * 8  # sequences, tokens, layers, K and V, groups, channels
    assert costs.memory_mb(sizes) * 2**20 == costs.params(sizes) * 4 + cache * 2
    whole = 3 * 10 * 4 * 2 * 2 * 8
    assert costs.memory_mb({}) * 2**20 == costs.params({}) * 4 + whole * 2


def test_a_window_bounds_the_cache_and_latent_attention_keeps_its_latent(hf_folder):
    table, costs = costs_of(hf_folder("gemma3"), range(7))
    windows = [layer.self_attention.core_attention.window_size for layer in table.model.decoder.layers]
    tokens = sum(10 if w in (None, (-1, 0), (-1, -1)) else min(10, w[0] + 1) for w in windows)
    assert costs.memory_mb({}) * 2**20 - costs.params({}) * 4 == 3 * 2 * tokens * 2 * 2 * 16
    _, costs = costs_of(hf_folder("deepseek_v3"))
    latent = 3 * 10 * 4 * (24 + 8) * 2
    assert (
        costs.memory_mb({"num_attention_heads": 4}) * 2**20
        == costs.params({"num_attention_heads": 4}) * 4 + latent
    )


def test_a_mamba_layer_keeps_its_convolution_and_its_state(hf_folder):
    model = matrix.load(hf_folder("nemotron_h"), grouped=False).unwrapped_model  # M*-M*-
    costs = Costs(table_of(model), list(range(6)), SERVING, 4)
    sizes = {"mamba_num_heads": 6, "mamba_head_dim": 8}
    groups, head = model.config.num_query_groups, model.config.kv_channels
    attention = 2 * 10 * 2 * groups * head  # layers, tokens, K and V
    mamba = 2 * (
        (6 * 8 + 2 * 2 * 8) * 4 + 6 * 8 * 8
    )  # layers of: x, B and C of 4 taps; a state of 8 a channel
    cache = 3 * (attention + mamba) * 2
    assert costs.memory_mb(sizes) * 2**20 == costs.params(sizes) * 4 + cache


def test_operations_of_a_dense_model(hf_folder):
    table, costs = costs_of(hf_folder("llama"))
    model = table.model
    weights = sum(
        p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "word_embeddings" not in n
    )
    # Each of 8 heads of 8 channels: a product with 5.5 keys and one with 5.5 values, on the average.
    attention = 4 * (8 * 8) * 2 * 2 * 5.5
    assert costs.flops({}) == 2 * weights + attention


def test_a_tied_head_works_and_an_embedding_does_not(hf_folder):
    _, tied = costs_of(hf_folder("llama_tied"))
    _, untied = costs_of(hf_folder("llama"))
    assert tied.flops({}) == untied.flops({}) and tied.params({}) < untied.params({})


def test_only_the_chosen_experts_work(hf_folder):
    _, costs = costs_of(hf_folder("qwen3_moe"))
    fewer = {"num_moe_experts": 3}
    router = 2 * 64 * 4  # a row of the router in each of four layers
    assert costs.flops({}) - costs.flops(fewer) == router
    assert costs.params({}) - costs.params(fewer) == 4 * (3 * 32 * 64) + router // 2


def test_a_grid_is_counted_like_its_points(hf_folder):
    _, costs = costs_of(hf_folder("qwen3_moe_mixed"))
    grid = {
        "hidden_size": np.array([64, 40, 40]),
        "num_moe_experts": np.array([9, 9, 5]),
        "num_layers": np.array([4, 3, 2]),
    }
    for name in ("params", "active_params", "memory_mb", "flops"):
        one_by_one = [costs.of(name, {k: int(v[i]) for k, v in grid.items()}) for i in range(3)]
        assert np.allclose(costs.of(name, grid), one_by_one, rtol=1e-12)
        assert one_by_one == sorted(one_by_one, reverse=True)


def test_candidates_keep_every_bound_and_come_in_order(hf_folder):
    table, costs = costs_of(hf_folder("llama"), [0, 2, 3, 1])
    space = Space.of(table, [0, 2, 3, 1], STEPS, max_depth_pruning=0.5)
    limits = {"params": 0.75 * costs.params({}), "memory_mb": 0.8 * costs.memory_mb({})}
    found = inside_budget(
        space, costs, limits, lambda grid: -grid["ffn_hidden_size"] + 0.01 * grid["num_layers"]
    )
    everything = [c for chunk in space.grid() for c in zip(*chunk.values(), strict=True)]
    keep = [dict(zip(space.choices, map(int, row), strict=True)) for row in everything]
    keep = [c for c in keep if all(costs.of(n, c) <= limit for n, limit in limits.items())]
    assert found.grid == len(everything) and found.inside == len(keep) == len(found.predicted)
    keep.sort(key=lambda c: (-c["ffn_hidden_size"] + 0.01 * c["num_layers"], -costs.params(c)))
    assert [found.sizes(i) for i in range(5)] == keep[:5]
    assert found.params.tolist()[:5] == [costs.params(c) for c in keep[:5]]


def test_a_budget_below_the_smallest_candidate_says_what_can_be_had(hf_folder):
    table, costs = costs_of(hf_folder("llama"))
    space = Space.of(table, [0, 1, 2, 3], STEPS)
    least = costs.params(table.settle(space.smallest()))
    with pytest.raises(UserError, match=f"the smallest candidate has {least:,}"):
        inside_budget(space, costs, {"params": 10}, lambda grid: grid["hidden_size"])


def test_a_million_candidates_take_seconds_and_not_minutes(hf_folder):
    """CPU time of all four budgets, at a bound ten times what a busy machine needs; a loop takes minutes."""
    table, costs = costs_of(hf_folder("qwen3_moe_mixed"))
    draw = np.random.default_rng(0)
    sizes = {h: draw.integers(1, n + 1, 1_000_000) for h, n in table.hparams().items()}
    begin = time.process_time()
    counted = {name: costs.of(name, sizes) for name in BUDGETS}
    assert time.process_time() - begin < 5
    for place in (0, 999_999):
        one = {h: int(n[place]) for h, n in sizes.items()}
        assert all(counted[name][place] == pytest.approx(costs.of(name, one), rel=1e-12) for name in BUDGETS)
