"""The pruned config: every field that follows a size, and per-layer lists."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import hf_config
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from mbridge_prune.bridge.hf_config import pruned_hf_config


def megatron(**changes):
    sizes = {
        "hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_query_groups": 2,
        "num_layers": 2, "kv_channels": 8, "params_dtype": torch.float32,
    }  # fmt: skip
    return SimpleNamespace(**{**sizes, **changes})


def test_sizes_follow_and_the_rest_stays():
    before = hf_config("llama")
    after = pruned_hf_config(before, megatron(), [0, 2])
    changed = {k for k, v in after.to_dict().items() if before.to_dict().get(k) != v}
    assert changed <= {"hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "head_dim",
                       "torch_dtype", "dtype"}  # fmt: skip
    assert (after.hidden_size, after.intermediate_size, after.num_attention_heads) == (40, 56, 4)
    assert (after.num_hidden_layers, after.head_dim, after.num_key_value_heads) == (2, 8, 2)
    assert before.hidden_size == 64, "the original is not touched"


@pytest.mark.parametrize("heads", [4, 5])
def test_head_dim_is_written_where_it_would_be_derived_wrongly(heads):
    """Qwen2's config has no head_dim: transformers derives it from the sizes."""
    before = hf_config("qwen2")
    assert getattr(before, "head_dim", None) is None
    after = pruned_hf_config(before, megatron(num_attention_heads=heads, num_query_groups=1), [0, 2])
    model = AutoModelForCausalLM.from_config(after)
    assert model.model.layers[0].self_attn.head_dim == 8
    assert (getattr(after, "head_dim", None) is None) == (heads == 5)


def test_per_layer_lists_follow_the_layers_kept():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    before = hf_config("qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=8)
    before.no_rope_layers = [1, 0, 0, 1]
    after = pruned_hf_config(before, megatron(), [1, 2])
    assert after.layer_types == ["sliding_attention", "full_attention"]
    assert after.no_rope_layers == [0, 0]
    assert before.layer_types == kinds


@pytest.mark.parametrize(("kept", "full_layers"), [([0, 1], 2), ([0, 3], 1), ([2, 3], 0)])
def test_max_window_layers_counts_the_full_layers_kept(kept, full_layers):
    """Layers 0 and 1 attend fully, 2 and 3 through the window."""
    before = hf_config("qwen2", max_window_layers=2, use_sliding_window=True, sliding_window=8)
    after = pruned_hf_config(before, megatron(), kept)
    assert after.max_window_layers == full_layers
    assert after.layer_types == [before.layer_types[i] for i in kept]
    again = type(after)(**{k: v for k, v in after.to_dict().items() if k != "layer_types"})
    assert again.layer_types == after.layer_types, "the derived list agrees with the written one"


def test_a_list_of_ids_is_no_list_of_layers():
    before = LlamaConfig(num_hidden_layers=3, eos_token_id=[5, 6, 7])
    assert pruned_hf_config(before, megatron(), [0, 2]).eos_token_id == [5, 6, 7]


def test_the_names_of_older_configs():
    before = GPT2Config(n_embd=64, n_inner=256, n_head=8, n_layer=4)
    after = pruned_hf_config(before, megatron(ffn_hidden_size=128), [0, 2])
    assert (after.n_embd, after.n_inner, after.n_head, after.n_layer) == (40, 128, 4, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_the_weights(dtype):
    assert pruned_hf_config(hf_config("llama"), megatron(params_dtype=dtype), [0, 1]).dtype == dtype
