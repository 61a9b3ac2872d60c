"""The weighted ranking against what transformers sees and its own weights."""

from __future__ import annotations

import logging
import pickle
import re

import matrix
import pytest
import torch
from activations import Watch, expert_io, routing
from models import load, load_hf, loop_over, tokens
from torch import nn

import mbridge_prune as mbp
from mbridge_prune import runtime
from mbridge_prune.importance.weighted import WeightedRanking
from mbridge_prune.mcore_minitron import table_of

TEXT = tokens(9, seed=31)
LOOP = loop_over(*TEXT.split(3))


def scores(path, grouped=False, **config):
    model = matrix.load(path, grouped).unwrapped_model
    return mbp.score(model, {"forward_loop": LOOP, "importance": "weighted", **config})


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


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "separate"])
@pytest.mark.parametrize("family", ["qwen3_moe_mixed", "gpt_oss", "deepseek_v3"])
def test_channels_of_experts(hf_folder, family, grouped):
    """What an expert's down projection reads, times its router probability, over the tokens it is sent."""
    hf, found = load_hf(hf_folder(family)), scores(hf_folder(family), grouped=grouped).units
    seen, number = Watch(hf, TEXT), 0
    for place, layer in enumerate(hf.model.layers):
        router = getattr(layer.mlp, "router", None) or getattr(layer.mlp, "gate", None)
        if router is None:
            continue
        x_bsh = seen.entered[layer.mlp]
        probabilities, sent = routing(layer.mlp, router, x_bsh, hf.config)
        have = found[f"layers.{place}.moe_ffn_hidden_size"].double().view(sent.shape[1], -1)
        for expert in range(sent.shape[1]):
            mine = sent[:, expert]
            inner, _ = expert_io(layer.mlp.experts, expert, x_bsh.flatten(0, 1)[mine])
            down = getattr(layer.mlp.experts, "down_proj", None)
            weight = layer.mlp.experts[expert].down_proj.weight if down is None else down[expert].t()
            wanted = alone(inner.double() * probabilities[mine, expert, None], [weight], 1)
            torch.testing.assert_close(have[expert] / have[expert].sum(), wanted, rtol=1e-4, atol=1e-7)
            number += 1
        assert torch.isclose(have.sum(), torch.tensor(1.0).double())
    assert number >= 18


FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "fc1", "up_proj": "fc1",
         "in_proj_qkvz": "in_proj", "in_proj_ba": "in_proj"}  # fmt: skip
"""Leaves of transformers' modules that are one weight in Megatron."""


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "separate"])
@pytest.mark.parametrize("family", ["qwen3_moe_mixed", "qwen3_next"])
def test_the_hidden_size_of_mixtures(hf_folder, family, grouped):
    """Every linear layer that reads the hidden state; the experts of a layer are one, however many."""
    hf, energies = load_hf(hf_folder(family)), {}

    def seer(name: str):
        head, _, leaf = re.sub(r"experts\.\d+", "experts", name).rpartition(".")

        def see(linear: nn.Module, args: tuple) -> None:
            size_h = args[0].detach().double().flatten(0, -2).square().sum(0)
            energy_h = size_h * linear.weight.detach().double().square().sum(0)
            key = f"{head}.{FUSED.get(leaf, leaf)}"
            energies[key] = energies.get(key, 0) + energy_h

        return see

    readers = [(n, m) for n, m in hf.named_modules() if isinstance(m, nn.Linear) and m.in_features == 64]
    for name, module in readers:
        module.register_forward_pre_hook(seer(name))
    with torch.no_grad():
        hf(input_ids=TEXT, use_cache=False)
    assert sum("experts.fc1" in key for key in energies) >= 2 and len(readers) > 40
    wanted = sum(energy / energy.sum() for energy in energies.values())
    found = scores(hf_folder(family), grouped=grouped).units["hidden_size"].double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["nemotron_h", "nemotron_h_moe"])
def test_mambas_heads_and_channels(hf_folder, family):
    hf, found = matrix.load_hf(hf_folder(family))[0], scores(hf_folder(family)).units
    number = 0
    for place, layer in enumerate(hf.backbone.layers):
        if hasattr(layer.mixer, "out_proj"):
            x_tc, weight = read(hf, layer.mixer.out_proj), layer.mixer.out_proj.weight
            for hparam, channels in (("mamba_num_heads", hf.config.mamba_head_dim), ("mamba_head_dim", 1)):
                wanted = alone(x_tc, [weight], channels)
                have = found[f"layers.{place}.{hparam}"].double()
                torch.testing.assert_close(have, wanted, rtol=1e-4, atol=1e-7)
                number += 1
    assert number >= 4


FAMILIES = ["qwen3_moe", "deepseek_v3", "nemotron", "gemma2", "qwen3_next", "nemotron_h_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_does_not_rank_is_ranked_by_minitron(hf_folder, family, caplog):
    with caplog.at_level(logging.INFO, "mbridge_prune"):
        found = scores(hf_folder(family)).units
    plain = scores(hf_folder(family), importance="minitron").units
    assert found.keys() == plain.keys()
    same = {key.rpartition(".")[2] for key in found if torch.equal(found[key], plain[key])} - {"num_layers"}
    said = caplog.text.partition("weighted ranking: ")[2].partition(" are ranked")[0]
    assert same == {name for name in said.split(", ") if name}
    assert same == {"num_moe_experts"} & {key.rpartition(".")[2] for key in found}
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


def test_ranks_exchange_units_and_not_their_moments(hf_folder, monkeypatch):
    model, sizes, gather = load(hf_folder("qwen3")).unwrapped_model, [], runtime.gather_objects

    def gathered(thing, kind=None):
        sizes.append(len(pickle.dumps(thing)))
        return gather(thing, kind)

    with WeightedRanking(table_of(model)) as ranking:
        LOOP(model)
    monkeypatch.setattr(runtime, "gather_objects", gathered)
    assert ranking.units()
    moments = sum(total.nbytes for total in ranking.sums.values() if total.shape[1] > 1)
    assert sizes and sum(sizes) < moments
