"""Experts behind latent projections, which no architecture that Bridge imports has: Megatron's own model."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer import TransformerConfig
from models import cut, difference, run, tokens

from mbridge_prune import mcore_minitron, runtime
from mbridge_prune.dynamic import sort

HIDDEN, LATENT, EXPERTS, FFN, LAYERS = 48, 20, 6, 24, 2


@pytest.fixture(params=[True, False], ids=["grouped", "separate"])
def grouped(request) -> bool:
    return request.param


@pytest.fixture
def model(grouped) -> GPTModel:
    return build(grouped)


def build(grouped: bool) -> GPTModel:
    """The same weights at every call."""
    runtime.start_model_parallel()
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, moe_ffn_hidden_size=FFN, num_attention_heads=6,
        num_moe_experts=EXPERTS, moe_router_topk=2, moe_latent_size=LATENT, moe_grouped_gemm=grouped,
        moe_shared_expert_intermediate_size=16, add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        normalization="RMSNorm", use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        persist_layer_norm=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, moe_token_dispatcher_type="alltoall", moe_router_load_balancing_type="none",
    )  # fmt: skip
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=EXPERTS, moe_grouped_gemm=grouped)
    torch.manual_seed(3)
    model = GPTModel(
        config, spec, vocab_size=128, max_sequence_length=16, position_embedding_type="rope"
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((p if "norm" in name else 0) + torch.randn_like(p) * (0.5 if "embed" in name else 0.2))
    return model


def test_any_order_leaves_the_logits(model):
    before = run(model, tokens())
    table = mcore_minitron.table_of(model)
    generator = torch.Generator().manual_seed(5)
    sort(
        table,
        {
            k: a.order_by(torch.rand(a.size, generator=generator))
            for k, a in table.axes.items()
            if k != "num_layers"
        },
    )
    assert difference(run(model, tokens()), before) <= 1e-5


def test_experts_are_cut_and_the_latent_size_stays(model):
    sizes = {"hidden_size": 32, "num_moe_experts": 4, "moe_ffn_hidden_size": 16}
    plan = cut(model, sizes)
    assert {k: plan.sizes_after[k] for k in sizes} == sizes
    for layer in model.decoder.layers:
        assert layer.mlp.fc1_latent_proj.weight.shape == (LATENT, 32)
        assert layer.mlp.fc2_latent_proj.weight.shape == (32, LATENT)
        assert layer.mlp.router.weight.shape == (4, 32)
    # Gate and up [2 x 16, latent], down [latent, 16] of every expert.
    routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert routed == LAYERS * 4 * 3 * 16 * LATENT
    assert plan.params_after == sum(p.numel() for p in model.parameters())
    assert plan.active_after == plan.params_after - routed // 2
    assert run(model, tokens()).isfinite().all()


def test_a_removed_expert_is_one_the_router_never_chooses(model, grouped):
    """Cut to four experts equals the whole model whose router cannot see the other two."""
    whole, ids = build(grouped), tokens(seed=9)
    plan = cut(model, {"num_moe_experts": 4})
    for number, layer in enumerate(whole.decoder.layers):
        blind(layer.mlp.router, plan.kept[f"layers.{number}.num_moe_experts"][0])
    assert difference(run(model, ids), run(whole, ids)) <= 1e-5


def blind(router, seen: list[int]) -> None:
    """Makes a router see these experts alone."""
    gating, unseen = router.gating, torch.full((EXPERTS,), float("-inf"))
    unseen[seen] = 0
    router.gating = lambda x: gating(x) + unseen
