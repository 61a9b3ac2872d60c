"""Scores of experts, their channels, shared experts, Mamba heads and latent attention: against transformers."""

from __future__ import annotations

import logging

import pytest
import torch
from activations import minitron_scores
from matrix import load, load_hf, run_through, write_source
from models import cut, difference, loop_over, tokens

import mbridge_prune as mbp
from mbridge_prune.importance.statistics import RoutedNorm, Seen

FAMILIES = [
    "gemma2", "gemma3", "qwen3_moe_mixed", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "moonlight", "glm4_moe",
    "qwen3_next", "nemotron_h", "nemotron_h_moe",
]  # fmt: skip
MIXTURES = FAMILIES[2:-2] + FAMILIES[-1:]
PAD = 0


def scores(hf_folder, *batches, grouped=True, **config) -> mbp.mcore_minitron.Scores:
    model = load(hf_folder, grouped).unwrapped_model
    return mbp.score(model, {"importance": "minitron", "forward_loop": loop_over(*batches), **config})


def assert_same(have, want, tolerance=1e-5):
    """To fp32's precision of a score's largest value: a mean over few tokens has small channels."""
    assert have.keys() == want.keys()
    assert {key: difference(have[key].double(), want[key].double()) for key in want} == {
        key: pytest.approx(0, abs=tolerance) for key in want
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_transformers_activations(family, hf_folder):
    ids = tokens(4)
    have = scores(hf_folder(family), ids).units
    assert_same(have, minitron_scores(load_hf(hf_folder(family))[0], ids))
    for key, values in have.items():
        assert len(values) == 1 or values.std() > 0, f"{key} does not tell its units apart"


@pytest.mark.parametrize("family", MIXTURES)
def test_padded_positions_count_nowhere(family, hf_folder):
    """They are sent to experts, too, but in no sum; a sample that is all padding is none."""
    ids = tokens(4)
    ids[0, 5:], ids[1, -1], ids[3, :] = PAD, PAD, PAD
    want = minitron_scores(load_hf(hf_folder(family))[0], ids, ids != PAD)
    for grouped in (True, False):
        have = scores(hf_folder(family), ids[:1], ids[1:], grouped=grouped, pad_token_id=PAD).units
        assert_same(have, want)
    plain = scores(hf_folder(family), ids).units
    differs = [k for k in want if "moe" in k and not torch.allclose(plain[k], have[k], rtol=1e-2)]
    assert {k.rpartition(".")[2] for k in differs} >= {"num_moe_experts", "moe_ffn_hidden_size"}


@pytest.mark.parametrize("family", MIXTURES)
def test_grouped_and_separate_experts_and_any_batches(family, hf_folder):
    ids = tokens(5)
    whole = scores(hf_folder(family), ids).units
    assert_same(scores(hf_folder(family), ids, grouped=False).units, whole, 1e-6)
    assert_same(scores(hf_folder(family), *ids.split(2)).units, whole, 1e-6)
    assert_same(scores(hf_folder(family), *ids.split(1), grouped=False).units, whole, 1e-6)


def test_prediction_layers_are_scored_too(hf_folder):
    """Transformers has none to compare with: they have scores for every axis that the trunk's layers have."""
    model = load(hf_folder("glm4_moe_mtp")).unwrapped_model
    units = mbp.score(model, {"forward_loop": run_through}).units
    trunk = {key.rpartition(".")[2] for key in units if key.startswith("layers.3.")}
    assert {key.rpartition(".")[2] for key in units if key.startswith("mtp.0.")} == trunk
    assert len(units["num_layers"]) == 4, "depth is about the trunk"
    with pytest.raises(mbp.UserError, match=r"scores say nothing of mtp\.0\..*did not run that layer"):
        cut(model, {"hidden_size": 40}, forward_loop=loop_over(tokens()))


SILENT = {2: 4, 3: 7}
"""Layer -> the expert that no token is sent to."""


def avoid(model):
    for layer, expert in SILENT.items():
        router = model.model.layers[layer].mlp
        router = router.router if hasattr(router, "router") else router.gate
        if hasattr(router, "bias") and router.bias is not None:
            router.bias[expert] = -100
        else:
            router.e_score_correction_bias[expert] = -100


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "separate"])
@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_an_expert_without_tokens(family, grouped, tmp_path, caplog):
    write_source(family, tmp_path, avoid)
    ids = tokens(4)
    with caplog.at_level(logging.WARNING, logger="mbridge_prune"):
        found = scores(tmp_path, ids, grouped=grouped)
    assert_same(found.units, minitron_scores(load_hf(tmp_path)[0], ids))
    assert found.meta["experts_without_tokens"] == {f"layers.{la}": [e] for la, e in SILENT.items()}
    assert "no token" in caplog.text and "layers.2: 4; layers.3: 7" in caplog.text
    loaded = load(tmp_path, grouped)
    plan = cut(loaded.unwrapped_model, {"num_moe_experts": 8, "moe_ffn_hidden_size": 10})
    for layer, expert in SILENT.items():
        place = f"layers.{layer}"
        assert found.units[f"{place}.num_moe_experts"][expert] == 0
        assert expert not in plan.kept[f"{place}.num_moe_experts"][0], "it ranks last"
        assert plan.kept[f"{place}.moe_ffn_hidden_size"][expert] == list(range(10)), (
            "its channels keep their order"
        )
    assert plan.calibration["experts_without_tokens"] == found.meta["experts_without_tokens"]


@pytest.mark.parametrize("family", MIXTURES)
def test_without_the_routers_probability(family, hf_folder):
    """Only experts are ranked otherwise, and otherwise than by a factor; padded positions count nowhere."""
    ids = tokens(4)
    ids[0, 5:], ids[3, :] = PAD, PAD
    want = minitron_scores(load_hf(hf_folder(family))[0], ids, ids != PAD, gated=False)
    for grouped in (True, False):
        path = hf_folder(family)
        assert_same(scores(path, ids, grouped=grouped, pad_token_id=PAD, experts="gate_free").units, want)
    gated = minitron_scores(load_hf(hf_folder(family))[0], ids, ids != PAD)
    (key, *_) = [key for key in want if key.endswith("num_moe_experts")]
    ratio = want[key] / gated[key]
    assert ratio.max() > 1.01 * ratio.min()


def test_a_token_of_probability_zero_says_nothing():
    x_tc, gates_t = torch.ones(5, 4), torch.tensor([0.5, 0.0, 0.25, 1.0, 0.0])
    rows = RoutedNorm().rows(Seen(x_tc * gates_t[:, None], [3, 1, 1], gates=gates_t))
    assert torch.equal(rows, torch.tensor([[4.0, 2], [2, 1], [0, 0]], dtype=torch.float64))


def test_gate_free_scores_are_told_from_gated_ones(hf_folder, tmp_path):
    path, file = hf_folder("qwen3_moe_mixed"), tmp_path / "scores.safetensors"
    config = {"forward_loop": loop_over(tokens()), "experts": "gate_free"}
    found = mbp.score(load(path).unwrapped_model, {**config, "checkpoint": file})
    assert found.meta["experts"] == "gate_free"
    plan = cut(
        load(path).unwrapped_model, {"num_moe_experts": 6}, **config, importance="weighted", checkpoint=file
    )
    assert plan.calibration["experts"] == "gate_free"
    with pytest.raises(mbp.UserError, match="ranks experts by gate_free, and experts='gated' was asked for"):
        cut(load(path).unwrapped_model, {"num_moe_experts": 6}, importance="weighted", checkpoint=file)


@pytest.mark.parametrize(("family", "experts", "says"), [
    ("llama", "gate_free", "no effect: this model has no routed experts"),
    ("qwen3_moe", "gatefree", "did you mean 'gate_free'"),
])  # fmt: skip
def test_rankings_of_experts_that_are_refused(hf_folder, family, experts, says):
    with pytest.raises(mbp.UserError, match=says):
        scores(hf_folder(family), tokens(), experts=experts)


def test_probabilities_inside_the_experts_are_refused(hf_folder):
    model = load(hf_folder("qwen3_moe"), moe_apply_probs_on_input=True, moe_router_topk=1).unwrapped_model
    with pytest.raises(mbp.UserError, match="use experts='gated'"):
        mbp.score(model, {"forward_loop": loop_over(tokens()), "experts": "gate_free"})


def test_experts_that_all_work_are_not_reported(hf_folder, caplog):
    found = scores(hf_folder("qwen3_moe_mixed"), tokens(5))
    assert "experts_without_tokens" not in found.meta and "no token" not in caplog.text
