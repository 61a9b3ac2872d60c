"""Nemotron-H in plain PyTorch: the reference of the tests, under the parameter names of NVIDIA's checkpoints.

The state-space recurrence runs token by token, as it is written down in the Mamba-2 paper (Dao and Gu 2024,
arXiv 2405.21060): h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t. There is no cache.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nemotron_h import NemotronHConfig

ACTIVATIONS = {"relu2": lambda x: F.relu(x).square(), "silu": F.silu}


def wide(x: Tensor) -> Tensor:
    """In fp32; fp64 stays fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class NemotronHRMSNorm(nn.Module):
    """RMS norm, over groups of `group_size` channels where given."""

    def __init__(self, size: int, eps: float, group_size: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.group_size = eps, group_size or size

    def forward(self, x: Tensor) -> Tensor:
        groups = wide(x).unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups.flatten(-2) * wide(self.weight)).to(x.dtype)


class NemotronHGatedRMSNorm(NemotronHRMSNorm):
    """The norm of x silu(z): the gate comes before the norm."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(wide(x) * F.silu(wide(z))).to(x.dtype)


class NemotronHMamba2Mixer(nn.Module):
    """Mamba-2: projection, short causal convolution, state-space recurrence, gated norm, projection."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.inner = self.heads * self.head_dim
        self.bc_size = self.groups * self.state_size
        self.time_step_limit = tuple(config.time_step_limit)
        self.activation = ACTIVATIONS[config.mamba_hidden_act]
        conv_dim = self.inner + 2 * self.bc_size
        self.in_proj = nn.Linear(
            config.hidden_size, self.inner + conv_dim + self.heads, bias=config.use_bias
        )  # z, x, B, C, dt
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, config.conv_kernel, groups=conv_dim, bias=config.use_conv_bias
        )  # x, B, C
        self.A_log = nn.Parameter(torch.log(torch.arange(1, self.heads + 1).float()))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.ones(self.heads))
        self.norm = NemotronHGatedRMSNorm(self.inner, config.layer_norm_epsilon, self.inner // self.groups)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        z, xbc, dt = self.in_proj(hidden_bsh).split(
            [self.inner, self.inner + 2 * self.bc_size, self.heads], dim=-1
        )
        before = self.conv1d.kernel_size[0] - 1
        xbc = self.activation(self.conv1d(F.pad(xbc.mT, (before, 0))).mT)
        x, B, C = wide(xbc).split([self.inner, self.bc_size, self.bc_size], dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))
        each = self.heads // self.groups
        B = B.unflatten(-1, (self.groups, self.state_size)).repeat_interleave(each, dim=2)
        C = C.unflatten(-1, (self.groups, self.state_size)).repeat_interleave(each, dim=2)
        dt = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.time_step_limit)
        decay = torch.exp(-torch.exp(wide(self.A_log)) * dt)
        state = x.new_zeros(x.shape[0], self.heads, self.head_dim, self.state_size)
        outputs = []
        for t in range(x.shape[1]):
            into = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
            state = decay[:, t, :, None, None] * state + into
            outputs.append((state * C[:, t, :, None, :]).sum(-1) + wide(self.D)[:, None] * x[:, t])
        y = torch.stack(outputs, dim=1).flatten(2).to(hidden_bsh.dtype)
        return self.out_proj(self.norm(y, z))


class NemotronHAttention(nn.Module):
    """Causal grouped-query attention without positions."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        q, k, v = (
            proj(hidden_bsh).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        scores = wide(q @ k.mT) * self.head_dim**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class NemotronHMLP(nn.Module):
    """Two projections with a squared ReLU between them."""

    def __init__(self, config: NemotronHConfig, size: int | None = None):
        super().__init__()
        size = size or config.intermediate_size
        self.up_proj = nn.Linear(config.hidden_size, size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.mlp_hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


class NemotronHTopkRouter(nn.Module):
    """DeepSeek-V3's router: sigmoid scores; a bias for the choice only; groups of experts first."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def forward(self, x_th: Tensor) -> tuple[Tensor, Tensor]:
        """(experts, weights), both [tokens, num_experts_per_tok]."""
        config = self.config
        scores = F.linear(wide(x_th), wide(self.weight)).sigmoid()
        choice = scores + self.e_score_correction_bias
        if config.n_group > 1:
            by_group = choice.unflatten(-1, (config.n_group, -1))
            best_two = by_group.topk(2, dim=-1).values.sum(-1)
            allowed = torch.zeros_like(best_two, dtype=torch.bool)
            allowed.scatter_(1, best_two.topk(config.topk_group, dim=-1).indices, True)
            choice = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        experts = choice.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class NemotronHMOE(nn.Module):
    """Routed experts beside one MLP that sees every token."""

    def __init__(self, config: NemotronHConfig):
        super().__init__()
        self.gate = NemotronHTopkRouter(config)
        self.experts = nn.ModuleList(
            NemotronHMLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = NemotronHMLP(config, config.moe_shared_expert_intermediate_size)

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        x_th = hidden_bsh.flatten(0, 1)
        chosen, weights = self.gate(x_th)
        out = torch.zeros_like(x_th)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            out[token] += expert(x_th[token]) * weights[token, place, None].to(x_th.dtype)
        return (out + self.shared_experts(x_th)).view_as(hidden_bsh)


MIXERS = {
    "mamba": NemotronHMamba2Mixer,
    "attention": NemotronHAttention,
    "mlp": NemotronHMLP,
    "moe": NemotronHMOE,
}


class NemotronHBlock(nn.Module):
    """Norm, one mixer of the layer's type, residual."""

    def __init__(self, config: NemotronHConfig, block_type: str):
        super().__init__()
        self.norm = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[block_type](config)
        self.residual_in_fp32 = config.residual_in_fp32

    def forward(self, hidden_bsh: Tensor) -> Tensor:
        residual = wide(hidden_bsh) if self.residual_in_fp32 else hidden_bsh
        return residual + self.mixer(self.norm(hidden_bsh.to(self.norm.weight.dtype)))


class NemotronHPreTrainedModel(PreTrainedModel):
    config_class = NemotronHConfig
    base_model_prefix = "backbone"
    _no_split_modules = ["NemotronHBlock"]


class NemotronHModel(NemotronHPreTrainedModel):
    def __init__(self, config: NemotronHConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NemotronHBlock(config, kind) for kind in config.layers_block_type)
        self.norm_f = NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(self, input_ids: Tensor) -> Tensor:
        """[b, s] to [b, s, hidden_size]."""
        hidden_bsh = self.embeddings(input_ids)
        for layer in self.layers:
            hidden_bsh = layer(hidden_bsh)
        return self.norm_f(hidden_bsh.to(self.norm_f.weight.dtype))


class NemotronHForCausalLM(NemotronHPreTrainedModel, GenerationMixin):
    _tied_weights_keys = ["lm_head.weight"]

    def __init__(self, config: NemotronHConfig):
        super().__init__(config)
        self.backbone = NemotronHModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, vocab_size]; with labels [b, s], the mean next-token loss too."""
        if attention_mask is not None and not attention_mask.bool().all():
            raise ValueError("padded batches are not supported: a recurrence would run over the padding")
        logits = wide(self.lm_head(self.backbone(input_ids)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)
