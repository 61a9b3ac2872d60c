"""What a model is refused for, or warned of, before its weights are read."""

from __future__ import annotations

import json

import pytest
import torch
from models import load, tokens, write_hf
from nemotron_h import write_nemotron_h
from safetensors.torch import load_file, save_file

import mbridge_prune as mbp
from mbridge_prune import UserError
from mbridge_prune.dry_run import forecast

LOST = "multi-token-prediction heads that Megatron-Bridge does not import are dropped: 1"


def remote(path, **overrides):
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path, provider_overrides={"seq_length": 16, **overrides}, trust_remote_code=True
    ).unwrapped_model


@pytest.fixture
def deepseek(tmp_path):
    """Says that it has one prediction head, as DeepSeek-V3 does."""
    write_hf("deepseek_v3", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_nextn_predict_layers": 1}))
    return tmp_path / "model"


def test_prediction_heads_that_bridge_does_not_import(deepseek, tmp_path, caplog):
    forecast(deepseek, {"hidden_size": 48})
    assert LOST in caplog.messages
    caplog.clear()
    loaded = load(deepseek)
    assert LOST in caplog.messages
    sizes, config = {"hidden_size": 48}, {"forward_loop": mbp.CalibrationLoop(tokens(4), 1)}
    _, plan = mbp.prune(loaded.unwrapped_model, "mcore_minitron", {"export_config": sizes}, config=config)
    mbp.export_hf(
        loaded.bridge, loaded.model, tmp_path / "hf", layers_kept=plan.layers_kept, sizes=plan.sizes_after
    )
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_prediction_heads_that_only_the_weights_tell_of(tmp_path, caplog):
    """Qwen3-Next."""
    write_hf("qwen3_next", tmp_path)
    load(tmp_path)
    assert LOST not in caplog.messages
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {**weights, "mtp.fc.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    load(tmp_path)
    assert LOST in caplog.messages


def test_pipeline_separators_of_a_pattern_are_left_out(tmp_path):
    write_nemotron_h(tmp_path, "M-M*ME")
    model = remote(tmp_path, hybrid_override_pattern="M-M|*ME")
    assert model.decoder.layer_type_list == list("M-M*ME")


def test_separate_experts_of_a_hybrid_model(tmp_path):
    write_nemotron_h(tmp_path, "ME")
    model = remote(tmp_path, moe_grouped_gemm=False)
    assert type(model.decoder.layers[1].mlp.experts).__name__ == "SequentialMLP"


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen3_vl_moe", {"moe_grouped_gemm": False}, "leave moe_grouped_gemm=True"),
        ("qwen3_moe", {"expert_tensor_parallel_size": 2}, "set expert_tensor_parallel_size=1"),
        ("qwen3_moe", {"moe_pad_expert_input_to_capacity": True}, "moe_pad_expert_input_to_capacity=False"),
        ("qwen3_moe", {"moe_router_padding_for_quantization": True}, "for_quantization=False"),
        ("llama", {"tensor_model_parallel_size": 2}, "prune from that scores file"),
    ],
)
def test_refused(tmp_path, family, overrides, message):
    write_hf(family, tmp_path)
    with pytest.raises(UserError, match=message):
        forecast(tmp_path, {"num_attention_heads": 4}, provider_overrides=overrides)


def test_a_size_of_experts_is_not_written_into_the_dense_one(tmp_path):
    """Megatron's separate experts share the model's configuration where both sizes are equal."""
    write_hf("qwen3_moe", tmp_path / "model", intermediate_size=32, moe_intermediate_size=32)
    config = {"forward_loop": mbp.CalibrationLoop(tokens(4), 1)}
    said = []
    for grouped in (True, False):
        loaded = load(tmp_path / "model", moe_grouped_gemm=grouped)
        constraints = {"export_config": {"moe_ffn_hidden_size": 16}}
        _, plan = mbp.prune(loaded.unwrapped_model, "mcore_minitron", constraints, config=config)
        out = tmp_path / f"hf-{grouped}"
        mbp.export_hf(loaded.bridge, loaded.model, out, layers_kept=plan.layers_kept, sizes=plan.sizes_after)
        said.append(json.loads((out / "config.json").read_text()))
    assert (
        said[0] == said[1] and said[0]["moe_intermediate_size"] == 16 and said[0]["intermediate_size"] == 32
    )
