"""The weighted ranking against what transformers sees and its own weights."""

from __future__ import annotations

import logging

import pytest
import torch
from models import load, load_hf, loop_over, tokens
from torch import nn

import mbridge_prune as mbp

TEXT = tokens(9, seed=31)
LOOP = loop_over(*TEXT.split(3))


def scores(path, **config):
    return mbp.score(load(path).unwrapped_model, {"forward_loop": LOOP, "importance": "weighted", **config})


def read(hf: nn.Module, module: nn.Module) -> torch.Tensor:
    """[tokens, channels] fp64: the inputs of a transformers module."""
    found: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda m, args: found.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        hf(input_ids=TEXT, use_cache=False)
    hook.remove()
    return torch.cat(found)


def alone(x_tc: torch.Tensor, weights: list[torch.Tensor], channels: int) -> torch.Tensor:
    """Squared norm of what each unit alone makes the weights write, as shares of their sum."""
    w = torch.cat([weight.detach().double() for weight in weights])
    parts = [
        (x_tc[:, i : i + channels] @ w[:, i : i + channels].t()).square().sum()
        for i in range(0, x_tc.shape[1], channels)
    ]
    return torch.stack(parts) / sum(parts)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3"])
def test_every_axis_of_a_dense_model(hf_folder, family):
    hf, found = load_hf(hf_folder(family)), scores(hf_folder(family)).units
    hidden = []
    for number, layer in enumerate(hf.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        heads = alone(read(hf, attention.o_proj), [attention.o_proj.weight], attention.head_dim)
        place = f"layers.{number}"
        torch.testing.assert_close(
            found[f"{place}.num_attention_heads"].double(), heads, rtol=1e-4, atol=1e-7
        )
        groups = heads.view(2, -1).sum(1)
        torch.testing.assert_close(found[f"{place}.num_query_groups"].double(), groups, rtol=1e-4, atol=1e-7)
        ffn = alone(read(hf, mlp.down_proj), [mlp.down_proj.weight], 1)
        torch.testing.assert_close(found[f"{place}.ffn_hidden_size"].double(), ffn, rtol=1e-4, atol=1e-7)
        qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        hidden.append(alone(read(hf, attention.q_proj), qkv, 1))
        hidden.append(alone(read(hf, mlp.up_proj), [mlp.gate_proj.weight, mlp.up_proj.weight], 1))
    if family != "llama_tied":
        hidden.append(alone(read(hf, hf.lm_head), [hf.lm_head.weight], 1))
    torch.testing.assert_close(found["hidden_size"].double(), sum(hidden), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron", "gemma2", "qwen3_next"])
def test_what_it_does_not_rank_is_ranked_by_minitron(hf_folder, family, caplog):
    with caplog.at_level(logging.INFO, "mbridge_prune"):
        found = scores(hf_folder(family)).units
    plain = scores(hf_folder(family), importance="minitron").units
    assert found.keys() == plain.keys()
    same = {key.rpartition(".")[2] for key in found if torch.equal(found[key], plain[key])} - {"num_layers"}
    said = caplog.text.partition("weighted ranking: ")[2].partition(" are ranked")[0]
    assert same == {name for name in said.split(", ") if name}
    assert ("num_moe_experts" in same) == ("num_moe_experts" in {k.rpartition(".")[2] for k in found})
    assert torch.equal(found["num_layers"], plain["num_layers"])


def test_a_scores_file_of_the_other_ranking_is_refused(hf_folder, tmp_path):
    scores(hf_folder("llama"), checkpoint=tmp_path / "scores.safetensors")
    with pytest.raises(mbp.UserError, match="ranking"):
        mbp.prune(
            load(hf_folder("llama")).unwrapped_model,
            "mcore_minitron",
            {"export_config": {"ffn_hidden_size": 64}},
            config={
                "forward_loop": LOOP,
                "checkpoint": tmp_path / "scores.safetensors",
                "importance": "minitron",
            },
        )


def test_padded_text_is_refused(hf_folder):
    with pytest.raises(mbp.UserError, match="full sequences"):
        scores(hf_folder("llama"), pad_token_id=0)
