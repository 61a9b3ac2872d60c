"""Megatron on the reference kernels against transformers, and a hybrid model end to end."""

import mbridge_prune  # noqa: F401  isort: skip
import pytest
import torch
import torch.distributed as dist
from megatron.bridge import AutoBridge
from megatron.core import parallel_state
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

TINY = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
OFF = (
    "gradient_accumulation_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "persist_layer_norm",
    "moe_permute_fusion",
    "moe_router_fusion",
    "cross_entropy_loss_fusion",
    "bf16",
    "fp16",
)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    if started:
        dist.destroy_process_group()


def megatron_from(folder):
    provider = AutoBridge.from_hf_pretrained(folder).to_megatron_provider(load_weights=True)
    for name in OFF:
        if hasattr(provider, name):
            setattr(provider, name, False)
    provider.params_dtype = provider.pipeline_dtype = provider.autocast_dtype = torch.float32
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False)[0].eval()


@pytest.mark.parametrize(
    "config,tolerance",
    [
        (Qwen3Config(**TINY), 0.0),
        (LlamaConfig(**TINY, tie_word_embeddings=True), 0.0),
        (
            Qwen3MoeConfig(
                **TINY,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                norm_topk_prob=True,
            ),
            1e-5,
        ),
    ],
    ids=["qwen3", "llama-tied", "qwen3-moe"],
)
def test_logits_are_those_of_transformers(config, tolerance, tmp_path):
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(config).float().eval()
    dense.save_pretrained(tmp_path)
    model = megatron_from(str(tmp_path))
    tokens = torch.randint(0, 128, (2, 24))
    with torch.no_grad():
        got = model(tokens, torch.arange(24).expand(2, -1), None)[..., :128]
        want = dense(tokens).logits
    assert (got - want).abs().max() <= tolerance


def test_hybrid_runs_forward_and_backward():
    config = TransformerConfig(
        num_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=96,
        normalization="RMSNorm",
        add_bias_linear=False,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_num_groups=2,
        mamba_state_dim=8,
        params_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=False,
    )
    model = MambaModel(
        config,
        mamba_stack_spec,
        vocab_size=128,
        max_sequence_length=64,
        hybrid_override_pattern="M*-",
    )
    tokens = torch.randint(0, 128, (2, 40))
    logits = model(tokens, torch.arange(40).expand(2, -1), None)
    assert logits.shape == (2, 40, 128)
    changed = tokens.clone()
    changed[:, 30] = (changed[:, 30] + 1) % 128
    later = model(changed, torch.arange(40).expand(2, -1), None)
    torch.testing.assert_close(later[:, :30], logits[:, :30])  # causal
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
