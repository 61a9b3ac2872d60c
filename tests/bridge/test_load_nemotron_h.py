"""Nemotron-H, whose code comes with the checkpoint: Megatron against the plain reference of tests/nemotron_h."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import difference, run, run_hf, tokens
from nemotron_h import nemotron_h_config, random_nemotron_h, write_nemotron_h
from transformers import AutoModelForCausalLM

import mbridge_prune as mbp


def load_remote(path: Path, grouped: bool = True, **overrides: Any) -> Any:
    from megatron.core.transformer.enums import AttnBackend

    if not grouped:
        overrides["mamba_stack_spec"] = _one_gemm_an_expert
    overrides = {"seq_length": 16, "attention_backend": AttnBackend.auto, **overrides}  # one a process
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=path, provider_overrides=overrides, moe_grouped_gemm=grouped,
        trust_remote_code=True,
    )  # fmt: skip


def _one_gemm_an_expert(provider: Any) -> Any:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    spec = copy.deepcopy(mamba_stack_spec)  # its experts are grouped, whatever the provider says
    spec.submodules.moe_layer.submodules.mlp = get_moe_module_spec(
        use_te=True, num_experts=provider.num_moe_experts, moe_grouped_gemm=False
    )
    return spec


@pytest.mark.parametrize("pattern", ["M-M*ME", "M*-M*-", "MMMM"])
@pytest.mark.parametrize("length", [12, 150])  # 150 is more than one chunk of Megatron's scan
def test_the_imported_model_is_the_model(tmp_path, pattern, length):
    reference = write_nemotron_h(tmp_path, pattern)
    ids = tokens(length=length)
    loaded = load_remote(tmp_path)
    assert loaded.unwrapped_model.decoder.layer_type_list == list(pattern)
    assert difference(run(loaded.unwrapped_model, ids), run_hf(reference, ids)) <= 1e-5


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
        {"n_shared_experts": 2, "routed_scaling_factor": 1.0},
    ],
)
def test_routing_and_both_kinds_of_experts(tmp_path, routing, grouped, overlap):
    reference = write_nemotron_h(tmp_path, "ME*E", **routing)
    model = load_remote(tmp_path, grouped, moe_shared_expert_overlap=overlap).unwrapped_model
    experts = type(model.decoder.layers[1].mlp.experts).__name__
    assert experts == ("TEGroupedMLP" if grouped else "SequentialMLP")
    ids = tokens()
    assert difference(run(model, ids), run_hf(reference, ids)) <= 1e-5


def test_goes_back_bit_by_bit(tmp_path):
    state = write_nemotron_h(tmp_path).state_dict()
    bridge, _, model, _, _ = load_remote(tmp_path)
    back = dict(bridge.export_hf_weights(model, cpu=True, show_progress=False))
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_without_trust_it_is_refused(tmp_path):
    write_nemotron_h(tmp_path)
    with pytest.raises(mbp.UserError, match="custom code"):
        mbp.load_mbridge_model_from_hf(hf_model_name_or_path=tmp_path)


def test_transformers_reads_the_folder(tmp_path):
    reference = write_nemotron_h(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.float32).eval()
    ids = tokens()
    assert torch.equal(run_hf(hf, ids), run_hf(reference, ids))
    longer = hf.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(longer[:, 12], run_hf(reference, ids)[:, -1].argmax(-1))


def test_every_tensor_of_the_reference_matters():
    model = random_nemotron_h(nemotron_h_config())
    ids = tokens()
    whole = run_hf(model, ids)
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor.zero_()
        assert difference(run_hf(model, ids), whole) > 1e-4, name
        tensor.copy_(kept)


def test_the_reference_looks_back_beyond_its_convolution_and_never_ahead():
    model = random_nemotron_h(nemotron_h_config("M"))
    ids = tokens()
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 128
    effect = (run_hf(model, changed) - run_hf(model, ids)).abs().amax((0, 2))
    assert effect[:4].max() == 0
    assert effect[8:].min() > 1e-4  # three tokens are the convolution's reach
