"""Pruned a second time: from saved scores without a forward pass, and the pruned model itself."""

from __future__ import annotations

import pytest
import torch
from matrix import TOLERANCE, cuts, full_sizes, load, load_hf, run_through, write_source
from models import cut, difference, run, run_hf, tokens
from references import sliced_state
from safetensors.torch import load_file

import mbridge_prune as mbp

FAMILIES = ["qwen3_moe_mixed", "gpt_oss", "deepseek_v3", "glm4_moe_mtp", "qwen3_next", "nemotron_h_moe"]
IDS = tokens(seed=16)
FIRST = {
    "hidden_size": 56, "ffn_hidden_size": 80, "num_attention_heads": 6, "num_moe_experts": 7, "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 24, "mamba_num_heads": 8, "mamba_head_dim": 10,
}  # fmt: skip


def no_forward(model):
    raise AssertionError("the scores are there: nothing is to be run")


@pytest.mark.parametrize("family", FAMILIES)
def test_from_saved_scores_bit_for_bit(family, hf_folder, tmp_path):
    target, path = cuts(family)["all"], tmp_path / "scores.safetensors"
    first, second, other = (
        load(hf_folder(family), grouped).unwrapped_model for grouped in (True, True, False)
    )
    plan = cut(first, target, forward_loop=run_through, checkpoint=path)
    again = cut(second, target, forward_loop=no_forward, checkpoint=path)
    assert again.to_dict() == plan.to_dict()
    state, repeated = first.state_dict(), second.state_dict()
    assert state.keys() == repeated.keys()
    assert all(torch.equal(state[n], repeated[n]) for n in state if torch.is_tensor(state[n]))
    # Scores of grouped experts serve separate ones.
    assert cut(other, target, forward_loop=no_forward, checkpoint=path).kept == plan.kept
    assert difference(run(other, IDS), run(first, IDS)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_model_is_pruned_again(family, hf_folder, tmp_path):
    """In the same process: the second plan is about what the first one left."""
    loaded, dense = load(hf_folder(family)), load_hf(hf_folder(family))[0]
    full = full_sizes(dense.config)
    target = {hparam: size for hparam, size in FIRST.items() if hparam in full}
    if family == "deepseek_v3":
        target["num_moe_experts"] = 9
    first = cut(
        loaded.unwrapped_model, {**target, "num_layers": full["num_layers"] - 1}, forward_loop=run_through
    )
    mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "first", layers_kept=first.layers_kept,
                  source=hf_folder(family), trust_remote_code=True)  # fmt: skip
    second = cut(loaded.unwrapped_model, cuts(family)["all"], forward_loop=run_through)
    assert second.sizes_before == first.sizes_after
    assert (second.params_before, second.active_before) == (first.params_after, first.active_after)
    kept = [first.layers_kept[i] for i in second.layers_kept]
    mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "second", layers_kept=kept,
                  source=hf_folder(family), trust_remote_code=True)  # fmt: skip
    exported, _ = load_hf(tmp_path / "second")
    assert full_sizes(exported.config) == second.sizes_after
    assert difference(run(loaded.unwrapped_model, IDS), run_hf(exported, IDS)) <= TOLERANCE
    between = load_hf(tmp_path / "first")[0].config.get_text_config()
    want = sliced_state(load_file(tmp_path / "first/model.safetensors"), between, second)
    have = load_file(tmp_path / "second/model.safetensors")
    assert want.keys() == have.keys()
    assert all(torch.equal(want[name], have[name]) for name in want)


@pytest.mark.parametrize("family", ["glm4_moe", "nemotron_h_moe"])
def test_in_two_steps_from_disk(family, hf_folder, tmp_path):
    """The export is a model like any other: imported, scored, cut and exported again."""
    loaded = load(hf_folder(family))
    first = cut(loaded.unwrapped_model, {"hidden_size": 56, "moe_ffn_hidden_size": 16})
    mbp.export_hf(loaded.bridge, loaded.model, tmp_path / "first", layers_kept=first.layers_kept,
                  source=hf_folder(family), trust_remote_code=True)  # fmt: skip
    again = load(tmp_path / "first")
    target = {"num_moe_experts": 5, "num_layers": first.sizes_after["num_layers"] - 1}
    on_disk = cut(again.unwrapped_model, target)
    in_process = cut(loaded.unwrapped_model, target)
    assert on_disk.params_after == in_process.params_after
    assert on_disk.kept == in_process.kept and on_disk.layers_kept == in_process.layers_kept
    assert torch.equal(run(again.unwrapped_model, IDS), run(loaded.unwrapped_model, IDS))


def test_scores_of_another_model_are_refused(hf_folder, tmp_path):
    path = tmp_path / "scores.safetensors"
    cut(load(hf_folder("qwen3_moe_mixed")).unwrapped_model, {"num_moe_experts": 6}, checkpoint=path)
    write_source(
        "qwen3_moe_mixed",
        tmp_path / "other",
        lambda m: m.model.layers[1].mlp.experts[3].up_proj.weight.mul_(2),
    )
    with pytest.raises(mbp.UserError, match="scores of another model"):
        cut(load(tmp_path / "other").unwrapped_model, {"num_moe_experts": 6}, checkpoint=path)
