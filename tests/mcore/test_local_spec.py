"""Megatron's local layers: separate torch or apex norms, biases, a plain MLP, learned positions."""

from __future__ import annotations

import pytest
import torch
from megatron.core.fusions import fused_layer_norm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from models import cut, difference, kept_mask, run, tokens

from mbridge_prune import mcore, runtime
from mbridge_prune.dynamic import SliceTable, sort

HIDDEN, FFN, HEADS, GROUPS, LAYERS, DIM = 48, 80, 6, 2, 3, 8
SIZES = {"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_layers": 2}


class TorchAffine:
    """apex.normalization's affine function, in torch."""

    @staticmethod
    def forward(ctx, x, weight, bias, normalized_shape, eps):
        return torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)

    @classmethod
    def apply(cls, *args):
        return cls.forward(None, *args)


def build(norm: str, monkeypatch: pytest.MonkeyPatch) -> GPTModel:
    runtime.start_model_parallel()
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=GROUPS, kv_channels=DIM, normalization="RMSNorm" if norm == "RMSNorm" else "LayerNorm",
        add_bias_linear=True, add_qkv_bias=True, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, persist_layer_norm=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False,
        layernorm_zero_centered_gamma=norm == "FusedLayerNorm",
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization=config.normalization)
    spec = layer
    if norm == "FusedLayerNorm":
        monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", True)
        monkeypatch.setattr(fused_layer_norm, "FusedLayerNormAffineFunction", TorchAffine, raising=False)
        cls = fused_layer_norm.FusedLayerNorm
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = cls
        spec = TransformerBlockSubmodules(layer_specs=[layer] * LAYERS, layer_norm=cls)
    torch.manual_seed(2)
    model = GPTModel(
        config, spec, vocab_size=128, max_sequence_length=16, position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=norm != "LayerNorm",
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_((p if "norm" in name else 0) + torch.randn_like(p) * (0.5 if "embed" in name else 0.2))
    return model


@pytest.fixture(params=["RMSNorm", "LayerNorm", "FusedLayerNorm"])
def model(request, monkeypatch) -> GPTModel:
    return build(request.param, monkeypatch)


def norm_over(norm: torch.nn.Module, mask: torch.Tensor) -> None:
    """Replaces a norm's forward by its definition over the kept channels."""
    places = mask.nonzero()[:, 0]
    eps, centred = norm.eps, getattr(norm, "zero_centered_gamma", False)

    def forward(x):
        small = x[..., places]
        if norm._parameters.get("bias") is not None:
            small = small - small.mean(-1, keepdim=True)
        small = small / (small.square().mean(-1, keepdim=True) + eps).sqrt()
        out = torch.zeros_like(x)
        out[..., places] = small * (norm.weight[places] + (1 if centred else 0))
        if norm._parameters.get("bias") is not None:
            out[..., places] += norm.bias[places]
        return out

    norm.forward = forward


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm", "FusedLayerNorm"])
def test_pruned_equals_masked_dense(norm, monkeypatch):
    model, dense, ids = build(norm, monkeypatch), build(norm, monkeypatch), tokens()
    original = run(dense, ids)
    plan = cut(model, SIZES)
    hidden = kept_mask(plan.kept["hidden_size"], HIDDEN)
    with torch.no_grad():
        for name in ("word_embeddings", "position_embeddings"):
            getattr(dense.embedding, name).weight.mul_(hidden)
        for i, layer in enumerate(dense.decoder.layers):
            heads = kept_mask(plan.kept[f"layers.{i}.num_attention_heads"], HEADS).repeat_interleave(DIM)
            ffn = kept_mask(plan.kept[f"layers.{i}.ffn_hidden_size"], FFN)
            for linear, mask in ((layer.self_attention.linear_proj, heads), (layer.mlp.linear_fc2, ffn)):
                linear.weight.mul_(mask).mul_(hidden[:, None])
                linear.bias.mul_(hidden)
            norm_over(layer.input_layernorm, hidden)
            norm_over(layer.pre_mlp_layernorm, hidden)
        norm_over(dense.decoder.final_layernorm, hidden)
    dense.decoder.layers = torch.nn.ModuleList(dense.decoder.layers[i] for i in plan.layers_kept)
    assert difference(run(model, ids), run(dense, ids)) <= 1e-5
    assert difference(run(model, ids), original) > 1e-2
    assert plan.params_after == sum(p.numel() for p in model.parameters())


def test_sorting_leaves_the_logits(model):
    ids = tokens()
    before = run(model, ids)
    table = SliceTable.of(model, mcore.root_scope(model))
    torch.manual_seed(4)
    sort(table, {k: a.order_by(torch.rand(a.size)) for k, a in table.axes.items() if k != "num_layers"})
    assert difference(run(model, ids), before) <= 1e-5


def test_plain_attributes_follow(model):
    cut(model, SIZES)
    layer, config = model.decoder.layers[1], model.config
    assert (config.hidden_size, config.ffn_hidden_size, config.num_attention_heads) == (32, 48, 4)
    assert (config.num_layers, config.num_query_groups) == (2, GROUPS)
    norm = layer.input_layernorm
    assert tuple(getattr(norm, "normalized_shape", None) or norm.hidden_size) == (32,)
    assert (layer.mlp.linear_fc1.input_size, layer.mlp.linear_fc1.output_size) == (32, 48)
    assert (layer.mlp.linear_fc2.input_size, layer.mlp.linear_fc2.output_size) == (48, 32)
    attention = layer.self_attention
    assert attention.num_attention_heads_per_partition == 4
    assert attention.core_attention.hidden_size_per_partition == 4 * DIM
    assert attention.linear_qkv.output_size == 4 * DIM + 2 * GROUPS * DIM
    assert [m.layer_number for m in model.decoder.layers] == [1, 2]
    assert model.embedding.position_embeddings.embedding_dim == 32


def test_pruned_model_trains(model):
    cut(model, SIZES)
    ids = tokens()
    model.train()
    model(ids, torch.arange(ids.shape[1]).expand_as(ids), None).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
