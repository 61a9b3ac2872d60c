"""The forecast, made from config.json alone, against models that exist."""

from __future__ import annotations

import json

import pytest
from models import FAMILIES, cut, hf_config, load, load_hf, tokens, write_hf

import mbridge_prune as mbp
from mbridge_prune import UserError
from mbridge_prune.dry_run import check_target, forecast, meta_table

SIZES = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_layers": 3}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_before_and_after_are_the_real_ones(hf_folder, tmp_path, family):
    sizes = {**SIZES, "num_attention_heads": 8} if family == "nemotron" else SIZES
    if family == "llama_mha":
        sizes = {**sizes, "num_attention_heads": 4}
    hf_config(family).save_pretrained(tmp_path)  # no weights here
    (tmp_path / "config.json").write_text((hf_folder(family) / "config.json").read_text())
    said = forecast(tmp_path, sizes)
    plan = cut(load(hf_folder(family)).unwrapped_model, sizes)
    assert said.plan.params_before == load_hf(hf_folder(family)).num_parameters() == plan.params_before
    assert said.plan.params_after == plan.params_after
    assert said.plan.sizes_before == plan.sizes_before
    assert said.plan.sizes_after == plan.sizes_after


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        ({"pipeline_model_parallel_size": 2}, [3, 3]),
        ({"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}, [1, 5]),
        ({"pipeline_model_parallel_size": 3, "num_layers_in_last_pipeline_stage": 4}, [1, 1, 4]),
        ({"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 1,
          "num_layers_in_last_pipeline_stage": 1}, [1, 2, 2, 1]),
    ],
)  # fmt: skip
def test_weights_of_every_stage(tmp_path, family, overrides, layers):
    model = write_hf(family, tmp_path, num_hidden_layers=6)
    (tmp_path / "model.safetensors").unlink()
    said = forecast(tmp_path, {"ffn_hidden_size": 64}, provider_overrides=overrides)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    embedding = model.model.embed_tokens.weight.numel()
    want = [n * layer for n in layers]
    want[0] += embedding
    want[-1] += embedding + model.model.norm.weight.numel()  # a tied copy is stored there too
    assert [stage.layers for stage in said.stages] == layers
    assert [stage.params for stage in said.stages] == want
    assert said.bytes_per_param == 4


def test_choices_are_multiples_of_divisors_and_groups(hf_folder):
    said = forecast(hf_folder("llama"), {}, divisors={"hidden_size_divisor": 24, "num_layers_divisor": 2})
    assert said.choices["hidden_size"] == [24, 48, 64]
    assert said.choices["num_layers"] == [2, 4]
    assert said.choices["num_attention_heads"] == [2, 4, 6, 8]
    assert said.choices["num_query_groups"] == [1, 2]


def test_a_full_size_model_takes_no_memory(tmp_path):
    config = hf_config(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**data, "architectures": ["LlamaForCausalLM"], "head_dim": 128})
    )
    provider = check_target(tmp_path, {"num_layers": 40})
    table = meta_table(provider)
    assert all(entry.tensor().is_meta for entry in table.entries)
    assert forecast(tmp_path, {"num_layers": 40}).plan.params_before == 70_553_706_496  # Llama-3-70B


def test_what_prune_refuses_is_refused(hf_folder):
    for check in (forecast, check_target):
        with pytest.raises(UserError, match="did you mean 'hidden_size'"):
            check(hf_folder("llama"), {"hiden_size": 32})
        with pytest.raises(UserError, match="not a multiple of hidden_size_divisor=16"):
            check(hf_folder("llama"), {"hidden_size": 40}, divisors={"hidden_size_divisor": 16})
        with pytest.raises(UserError, match="do not divide over 3 pipeline stages"):
            check(hf_folder("llama"), {}, provider_overrides={"pipeline_model_parallel_size": 3})
        with pytest.raises(UserError, match="num_moe_experts=1 is too few for moe_router_topk=2"):
            check(hf_folder("qwen3_moe"), {"num_moe_experts": 1})
        with pytest.raises(UserError, match="mamba_num_heads is no dimension of GPTModel here"):
            check(hf_folder("llama"), {"mamba_num_heads": 4})


@pytest.mark.parametrize(
    "sizes", [{"hidden_size": 48}, {"num_attention_heads": 4, "moe_ffn_hidden_size": 16}]
)
def test_prediction_heads_count(tmp_path, sizes):
    """transformers' class leaves them out; Megatron-Bridge imports them."""
    write_hf("glm4_moe_mtp", tmp_path)
    said = forecast(tmp_path, sizes).plan
    loop = mbp.CalibrationLoop(tokens(4), 1)
    _, plan = mbp.prune(
        load(tmp_path).unwrapped_model,
        "mcore_minitron",
        {"export_config": sizes},
        config={"forward_loop": loop},
    )
    assert [said.params_before, said.params_after] == [plan.params_before, plan.params_after]
