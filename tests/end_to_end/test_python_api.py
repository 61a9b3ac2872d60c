"""The documented snippet, as a script of its own."""

from __future__ import annotations

import json

import pytest
from distributed.launching import ROOT, python

SNIPPET = """
import torch
import mbridge_prune as mbp
from mbridge_prune import get_hf_mbridge_calibration_loop, load_mbridge_model_from_hf

def loaded():
    return load_mbridge_model_from_hf(
        hf_model_name_or_path="{site}/model",
        provider_overrides={{"pipeline_model_parallel_size": 1, "pipeline_dtype": torch.float32, "seq_length": 12}},
        moe_grouped_gemm=False)

def ask(model):
    ids = torch.arange(3, 15)[None]
    return model(ids, torch.arange(12)[None], None)

bridge, provider, model, unwrapped_model, tokenizer = loaded()
forward_loop = get_hf_mbridge_calibration_loop(model=model, provider=provider, tokenizer=tokenizer,
    hf_model_name_or_path="{site}/model", dataset_name="{site}/text.txt", num_samples=16)
small, plan = mbp.prune(unwrapped_model, mode="mcore_minitron",
    constraints={{"export_config": {{"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 64}}}},
    dummy_input=None, config={{"forward_loop": forward_loop, "checkpoint": "{out}/scores.safetensors"}})
assert small is unwrapped_model
one = ask(unwrapped_model)

_, _, model, unwrapped_model, _ = loaded()
_, again = mbp.prune(unwrapped_model,
    mode=[("mcore_minitron", mbp.mcore_minitron.get_mcore_minitron_config(hidden_size_divisor=16,
        ffn_hidden_size_divisor=32, mamba_head_dim_divisor=8, num_moe_experts_divisor=8, num_layers_divisor=1))],
    constraints={{"export_config": {{"num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 64}}}},
    dummy_input=None, config={{"forward_loop": forward_loop, "checkpoint": "{out}/scores.safetensors"}})
assert torch.equal(ask(unwrapped_model), one)
assert again.kept == plan.kept and again.layers_kept == plan.layers_kept

_, _, model, unwrapped_model, _ = loaded()
def my_own_loop(model):
    for size in (1, 3):
        ids = torch.arange(3, 3 + 8 * size).view(size, 8)
        model(ids, torch.arange(8).expand_as(ids), None)
_, own = mbp.prune(unwrapped_model, "mcore_minitron", {{"export_config": {{"num_attention_heads": 4}}}},
    config={{"forward_loop": my_own_loop}})
assert ask(unwrapped_model).shape == one.shape

import json
json.dump({{"plan": plan.to_dict(), "params": sum(p.numel() for p in small.parameters())}}, open("{out}/result.json", "w"))
"""


@pytest.fixture(scope="module")
def done(site, tmp_path_factory):
    out = tmp_path_factory.mktemp("snippet")
    (out / "snippet.py").write_text(SNIPPET.format(site=site, out=out))
    return out, python(out / "snippet.py", PYTHONPATH=str(ROOT))


def test_the_documented_snippet_runs(done):
    out, process = done
    assert process.returncode == 0, process.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["plan"]["sizes_after"]["hidden_size"] == 48
    assert result["plan"]["params_after"] == result["params"]
    assert (out / "scores.safetensors").is_file()
