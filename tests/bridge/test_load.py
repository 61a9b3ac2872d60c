"""What cannot be loaded is refused with one sentence that says why."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from models import FAMILIES, difference, load, load_hf, run, run_hf, tokens, write_hf
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import mbridge_prune as mbp


@pytest.mark.parametrize("family", FAMILIES)
def test_the_imported_model_is_the_model(family, hf_folder):
    ids = tokens()
    loaded = load(hf_folder(family))
    assert difference(run(loaded.unwrapped_model, ids), run_hf(load_hf(hf_folder(family)), ids)) <= 1e-5
    assert not loaded.unwrapped_model.training


def test_unpacks_as_documented_and_without_a_tokenizer(hf_folder):
    bridge, provider, model, unwrapped, tokenizer = load(hf_folder("llama"))
    assert bridge is not None and provider.seq_length == 16 and provider.params_dtype == torch.float32
    assert model[0] is unwrapped or model[0].module is unwrapped
    assert tokenizer is None


@pytest.fixture
def copy(hf_folder, tmp_path):
    return shutil.copytree(hf_folder("llama"), tmp_path / "model")


def test_missing_folder(tmp_path):
    with pytest.raises(mbp.UserError, match=f"no such model folder: {tmp_path / 'nowhere'}"):
        load(tmp_path / "nowhere")


def test_no_config(copy):
    (copy / "config.json").unlink()
    with pytest.raises(mbp.UserError, match=r"no config\.json"):
        load(copy)


def test_config_that_is_no_json(copy):
    (copy / "config.json").write_text("{ half")
    with pytest.raises(mbp.UserError, match="cannot read the model config"):
        load(copy)


def test_no_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(mbp.UserError, match=r"no \.safetensors file"):
        load(copy)


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_corrupt_safetensors(copy, damage):
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-1000], "header": b"\xff" * 8 + whole[8:], "empty": b""}[damage])
    with pytest.raises(mbp.UserError, match=r"model\.safetensors is not a readable safetensors file"):
        load(copy)


def test_an_architecture_nobody_knows(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalML"]}))
    with pytest.raises(mbp.UserError, match="LlamaForCausalML.*did you mean 'LlamaForCausalLM'"):
        load(copy)


def test_an_architecture_that_bridge_lacks(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=32)).save_pretrained(tmp_path / "m")
    with pytest.raises(mbp.UserError, match="does not know the architecture GPT2LMHeadModel"):
        load(tmp_path / "m")


def test_wrong_override(hf_folder):
    with pytest.raises(
        mbp.UserError, match="'pipeline_model_paralel_size'.*did you mean 'pipeline_model_parallel_size'"
    ):
        load(hf_folder("llama"), pipeline_model_paralel_size=1)


@pytest.mark.parametrize(
    "layout",
    [{"pipeline_model_parallel_size": 3},
     {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1,
      "num_layers_in_last_pipeline_stage": 2},
     {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 5}],
)  # fmt: skip
def test_layers_that_do_not_divide(hf_folder, layout):
    with pytest.raises(mbp.UserError):
        load(hf_folder("llama"), pipeline_dtype=torch.float32, **layout)


def test_three_stages_of_four_layers_says_why(hf_folder):
    with pytest.raises(mbp.UserError, match="4 layers do not divide over 3 pipeline stages"):
        load(hf_folder("llama"), pipeline_dtype=torch.float32, pipeline_model_parallel_size=3)


def test_a_world_that_the_layout_does_not_divide(hf_folder):
    load(hf_folder("llama"))
    with pytest.raises(mbp.UserError, match="world size 1 is not a multiple of pipeline 2"):
        load(hf_folder("llama"), pipeline_dtype=torch.float32, pipeline_model_parallel_size=2)


def test_context_parallel_is_refused(hf_folder):
    with pytest.raises(mbp.UserError, match="context_parallel_size=2 is not supported"):
        load(hf_folder("llama"), context_parallel_size=2)
    with pytest.raises(mbp.UserError, match="the model has no experts; use --ep 1"):
        load(hf_folder("llama"), expert_model_parallel_size=2)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    """Megatron-Bridge only logs it, and leaves the weight as it was made."""
    write_hf("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(mbp.UserError, match=r"no weights .*layers\.2\.mlp\.linear_fc2\.weight"):
        load(tmp_path)


def test_log_levels_come_back(hf_folder, tmp_path):
    """`quiet` silences Megatron for a moment, also where loading fails inside it."""
    logger = logging.getLogger("megatron.core")
    before = logger.level
    load(hf_folder("llama"))
    with pytest.raises(mbp.UserError):
        load(hf_folder("llama"), no_such_field=1)
    assert logger.level == before
