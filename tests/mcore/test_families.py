"""Every dense family, cut along every hparam: against transformers, and against masked dense models."""

from __future__ import annotations

import pytest
import torch
from models import (
    FAMILIES,
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    WEAK_LAYER,
    cut,
    difference,
    load,
    load_hf,
    masked_dense,
    run,
    run_hf,
    sliced_state,
    tokens,
    write_hf,
)
from transformers import AutoModelForCausalLM

import mbridge_prune as mbp
from mbridge_prune import mcore
from mbridge_prune.dynamic import SliceTable, sort

TOLERANCE = 1e-5
SIZES = {"hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}
CUTS = {**{name: {name: size} for name, size in SIZES.items()}, "all": SIZES,
        "num_query_groups": {"num_query_groups": 1}, "groups_and_heads": {"num_query_groups": 1, "num_attention_heads": 3}}  # fmt: skip
FULL = {"hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS, "num_layers": LAYERS}
MHA = ("llama_mha",)


@pytest.fixture(
    scope="module",
    params=[(f, c) for f in FAMILIES for c in CUTS if f not in MHA or "groups" not in c],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def pruned(request, hf_folder, tmp_path_factory):
    """(dense HF model, pruned Megatron model, plan, exported HF model, its loading info, parameter)."""
    family, name = request.param
    source = hf_folder(family)
    loaded = load(source)
    plan = cut(loaded.unwrapped_model, CUTS[name])
    out = tmp_path_factory.mktemp("out") / "hf"
    mbp.export_hf(loaded.bridge, loaded.model, out, layers_kept=plan.layers_kept, source=source)
    hf, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    return load_hf(source), loaded.unwrapped_model, plan, hf.eval(), info, request.param


def test_pruned_megatron_equals_exported_transformers(pruned):
    _, megatron, _, exported, _, _ = pruned
    ids = tokens(seed=11)
    assert difference(run(megatron, ids), run_hf(exported, ids)) <= TOLERANCE


def test_pruned_equals_masked_dense(pruned):
    dense, megatron, plan, _, _, _ = pruned
    ids = tokens(seed=12)
    masked, got = run_hf(masked_dense(dense, plan), ids), run(megatron, ids)
    assert difference(got, masked) <= TOLERANCE
    assert difference(got, run_hf(dense, ids)) > 1e-2, "the cut changed nothing, so this proves nothing"


def test_exported_tensors_are_the_dense_ones_indexed(pruned):
    dense, _, plan, exported, _, _ = pruned
    want, have = sliced_state(dense, plan), exported.state_dict()
    assert want.keys() == have.keys()
    assert [n for n in want if not torch.equal(want[n], have[n])] == []


def test_strict_load_and_counts(pruned):
    dense, megatron, plan, exported, info, _ = pruned
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    real = sum(p.numel() for p in megatron.parameters())
    assert plan.params_after == real == exported.num_parameters()
    assert plan.params_before == dense.num_parameters()


def test_exported_config(pruned):
    dense, megatron, plan, exported, _, (family, name) = pruned
    groups_before = dense.config.num_key_value_heads
    full = FULL if family in MHA else {**FULL, "num_query_groups": groups_before}
    sizes, config = {**full, **CUTS[name]}, exported.config
    if name == "num_query_groups":  # as many heads a group as before
        sizes["num_attention_heads"] = HEADS // groups_before
    assert plan.sizes_after == sizes and plan.sizes_before == full
    assert config.hidden_size == sizes["hidden_size"] == megatron.config.hidden_size
    assert config.intermediate_size == sizes["ffn_hidden_size"] == megatron.config.ffn_hidden_size
    assert config.num_attention_heads == sizes["num_attention_heads"] == megatron.config.num_attention_heads
    assert config.num_hidden_layers == sizes["num_layers"] == megatron.config.num_layers
    groups = sizes["num_attention_heads"] if family in MHA else sizes["num_query_groups"]
    assert config.num_key_value_heads == groups == megatron.config.num_query_groups
    head_dim = dense.model.layers[0].self_attn.head_dim
    assert exported.model.layers[0].self_attn.head_dim == head_dim
    assert config.tie_word_embeddings == dense.config.tie_word_embeddings
    if getattr(config, "layer_types", None) is not None:
        assert len(config.layer_types) == sizes["num_layers"]
    if sizes["num_layers"] < LAYERS:
        assert WEAK_LAYER not in plan.layers_kept


@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_leaves_the_logits(family, hf_folder):
    """Any order of any axis, not only the one the scores give."""
    model, ids = load(hf_folder(family)).unwrapped_model, tokens()
    before = run(model, ids)
    weights = {n: p.clone() for n, p in model.named_parameters()}
    table = SliceTable.of(model, mcore.root_scope(model))
    generator = torch.Generator().manual_seed(3)
    orders = {
        key: axis.order_by(torch.rand(axis.size, generator=generator))
        for key, axis in table.axes.items()
        if key != "num_layers"
    }
    sort(table, orders)
    assert difference(run(model, ids), before) <= TOLERANCE
    untouched = [n for n, p in model.named_parameters() if torch.equal(p, weights[n])]
    assert all("q_layernorm" in n or "k_layernorm" in n for n in untouched)


@pytest.mark.parametrize("family", ["llama_tied", "llama_mha", "nemotron"])
def test_pruned_again(family, hf_folder, tmp_path):
    loaded, ids = load(hf_folder(family)), tokens(seed=5)
    first = cut(loaded.unwrapped_model, {"hidden_size": 48, "num_layers": 3, "num_attention_heads": 6})
    heads = 4
    second = cut(loaded.unwrapped_model, {**SIZES, "num_attention_heads": heads})
    assert second.sizes_before == first.sizes_after and second.params_before == first.params_after
    kept = [first.layers_kept[i] for i in second.layers_kept]
    mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "hf", layers_kept=kept)
    exported = load_hf(tmp_path / "hf")
    assert exported.num_parameters() == second.params_after
    assert difference(run(loaded.unwrapped_model, ids), run_hf(exported, ids)) <= TOLERANCE
    assert exported.config.num_attention_heads == heads


def test_exported_model_is_pruned_again_from_disk(hf_folder, tmp_path):
    loaded = load(hf_folder("qwen3"))
    plan = cut(loaded.unwrapped_model, SIZES)
    mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "hf", layers_kept=plan.layers_kept)
    again, ids = load(tmp_path / "hf"), tokens(seed=6)
    assert torch.equal(run(again.unwrapped_model, ids), run(loaded.unwrapped_model, ids))


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_vocabulary_that_megatron_would_pad(family, tmp_path):
    dense = write_hf(family, tmp_path / "in", vocab_size=100)
    loaded, ids = load(tmp_path / "in"), tokens(vocab=100)
    plan = cut(loaded.unwrapped_model, {"hidden_size": 40}, forward_loop=lambda m: run(m, ids))
    mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "hf", layers_kept=plan.layers_kept)
    exported = load_hf(tmp_path / "hf")
    assert exported.config.vocab_size == 100
    assert difference(run(loaded.unwrapped_model, ids)[..., :100], run_hf(exported, ids)) <= TOLERANCE
    assert difference(run_hf(exported, ids), run_hf(masked_dense(dense, plan), ids)) <= TOLERANCE
