"""The configuration of Nemotron-H: fields and defaults of the file that NVIDIA's checkpoints ship, own text.

Nemotron-H, Nemotron Nano 2 and Nemotron 3 Nano are read by it. transformers 4.57 has no such class, so a
checkpoint brings this file along and is loaded with trust_remote_code=True.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

LAYER_TYPES = {"M": "mamba", "-": "mlp", "*": "attention", "E": "moe"}
MOE_DEFAULTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
"""A model without an E layer has none of these, as in the older checkpoints."""


class NemotronHConfig(PretrainedConfig):
    model_type = "nemotron_h"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 131072,
        tie_word_embeddings: bool = False,
        hidden_size: int = 4096,
        intermediate_size: int = 21504,
        num_hidden_layers: int = 52,
        hybrid_override_pattern: str = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        num_attention_heads: int = 32,
        head_dim: int | None = 128,
        num_key_value_heads: int = 8,
        mlp_hidden_act: str = "relu2",
        attention_bias: bool = False,
        mlp_bias: bool = False,
        use_bias: bool = False,
        initializer_range: float = 0.02,
        layer_norm_epsilon: float = 1e-5,
        residual_in_fp32: bool = False,
        use_cache: bool = True,
        num_logits_to_keep: int | None = 1,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        sliding_window: int | None = None,
        max_position_embeddings: int = 4096,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        use_mamba_kernels: bool = True,
        ssm_state_size: int = 128,
        mamba_num_heads: int = 128,
        mamba_head_dim: int = 64,
        n_groups: int = 8,
        conv_kernel: int = 4,
        expand: int = 2,
        mamba_hidden_act: str = "silu",
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_limit: tuple[float, float] = (0.0, float("inf")),
        time_step_floor: float = 1e-4,
        use_conv_bias: bool = True,
        mamba_proj_bias: bool = False,
        chunk_size: int = 128,
        rescale_prenorm_residual: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.hybrid_override_pattern = hybrid_override_pattern
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.num_key_value_heads = num_key_value_heads
        self.mlp_hidden_act = mlp_hidden_act
        self.attention_bias = attention_bias
        self.mlp_bias = mlp_bias
        self.use_bias = use_bias
        self.initializer_range = initializer_range
        self.layer_norm_epsilon = layer_norm_epsilon
        self.residual_in_fp32 = residual_in_fp32
        self.use_cache = use_cache
        self.num_logits_to_keep = num_logits_to_keep
        self.sliding_window = sliding_window
        self.max_position_embeddings = max_position_embeddings
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.use_mamba_kernels = use_mamba_kernels
        self.ssm_state_size = ssm_state_size
        self.mamba_num_heads = mamba_num_heads
        self.mamba_head_dim = mamba_head_dim
        self.n_groups = n_groups
        self.conv_kernel = conv_kernel
        self.expand = expand
        self.mamba_hidden_act = mamba_hidden_act
        self.time_step_min = time_step_min
        self.time_step_max = time_step_max
        self.time_step_limit = time_step_limit
        self.time_step_floor = time_step_floor
        self.use_conv_bias = use_conv_bias
        self.mamba_proj_bias = mamba_proj_bias
        self.chunk_size = chunk_size
        self.rescale_prenorm_residual = rescale_prenorm_residual
        if len(hybrid_override_pattern) != num_hidden_layers:
            raise ValueError(
                f"hybrid_override_pattern has {len(hybrid_override_pattern)} layers, "
                f"num_hidden_layers is {num_hidden_layers}"
            )
        unknown = sorted(set(hybrid_override_pattern) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"hybrid_override_pattern: {unknown} are none of {sorted(LAYER_TYPES)}")
        if "E" in hybrid_override_pattern:
            for name, default in MOE_DEFAULTS.items():
                setattr(self, name, kwargs.pop(name, default))
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def layers_block_type(self) -> list[str]:
        """The type of every layer, in words."""
        return [LAYER_TYPES[symbol] for symbol in self.hybrid_override_pattern]
