"""Every family that Megatron-Bridge imports computes in Megatron what it computes in transformers."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from families import CONFIGS
from models import difference, load, load_hf, run, run_hf, tokens, write_hf
from safetensors.torch import load_file

import mbridge_prune as mbp
from mbridge_prune.bridge.load import open_bridge

FAMILIES = ["qwen3_moe", *CONFIGS]
PER_LAYER = (
    "moe_layer_freq",
    "linear_attention_freq",
    "window_size",
    "window_attn_skip_freq",
    "mtp_num_layers",
)


@pytest.mark.parametrize(
    ("family", "grouped"),
    [
        (f, g) for f in FAMILIES for g in (True, False) if g or f != "qwen3_vl_moe"
    ],  # Bridge always groups those
)
def test_the_imported_model_is_the_model(family, grouped, hf_folder):
    ids = tokens()
    model = load(hf_folder(family), moe_grouped_gemm=grouped).unwrapped_model
    assert difference(run(model, ids), run_hf(load_hf(hf_folder(family)), ids)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_alone_says_what_the_folder_says(family, hf_folder):
    _, whole = open_bridge(hf_folder(family), {}, weights=True)
    _, alone = open_bridge(hf_folder(family), {}, weights=False)
    for name in PER_LAYER:
        assert getattr(alone, name) == getattr(whole, name), name


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "separate"])
def test_prediction_layers_are_read(grouped, hf_folder):
    """transformers has no such layer to compare with, so the tensors are compared with the file's."""
    path = hf_folder("glm4_moe_mtp")
    layer = load(path, moe_grouped_gemm=grouped).unwrapped_model.mtp.layers[0]
    file = {
        name.removeprefix("model.layers.4."): tensor
        for name, tensor in load_file(path / "model.safetensors").items()
        if name.startswith("model.layers.4.")
    }
    inner, moe = layer.transformer_layer, layer.transformer_layer.mlp
    if grouped:
        fc1, fc2 = moe.experts.linear_fc1.weight8, moe.experts.linear_fc2.weight8
    else:
        expert = moe.experts.local_experts[8]
        fc1, fc2 = expert.linear_fc1.weight, expert.linear_fc2.weight
    gate, up = (file[f"mlp.experts.8.{name}_proj.weight"] for name in ("gate", "up"))
    for got, want in {
        layer.eh_proj.weight: file["eh_proj.weight"],
        layer.enorm.weight: file["enorm.weight"],
        layer.hnorm.weight: file["hnorm.weight"],
        layer.final_layernorm.weight: file["shared_head.norm.weight"],
        inner.self_attention.linear_proj.weight: file["self_attn.o_proj.weight"],
        moe.router.weight: file["mlp.gate.weight"],
        moe.router.expert_bias: file["mlp.gate.e_score_correction_bias"],
        fc1: torch.cat([gate, up]),
        fc2: file["mlp.experts.8.down_proj.weight"],
    }.items():
        assert torch.equal(got, want)


def test_prediction_layers_that_are_not_there_are_not_built(tmp_path):
    write_hf("glm4_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert load(tmp_path).provider.mtp_num_layers is None


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "no clip_qkv"),
        ("deepseek_v3", {"norm_topk_prob": False}, "no norm_topk_prob=False"),
        ("deepseek_v3", {"num_experts_per_tok": 6}, "by their 3 best scores, this model by the best 2"),
        ("qwen3_vl_moe", {"mlp_only_layers": [0]}, "this model has dense layers, too"),
        ("gemma3", {"layer_types": ["sliding_attention"] * 7}, "layer_types differ"),
    ],
)
def test_what_megatron_cannot_compute_is_refused(family, changes, message, tmp_path):
    write_hf(family, tmp_path, **changes)
    with pytest.raises(mbp.UserError, match=message):
        load(tmp_path)


def test_groups_that_megatron_ranks_otherwise_are_announced(tmp_path, caplog):
    write_hf("deepseek_v2", tmp_path, num_experts_per_tok=4)
    with caplog.at_level(logging.WARNING, logger="mbridge_prune"):
        open_bridge(tmp_path, {}, weights=False)
    assert "sum of their 2 best scores" in caplog.text
