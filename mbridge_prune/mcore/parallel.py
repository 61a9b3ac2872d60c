"""Which parallel layouts a model can be measured and cut under."""

from __future__ import annotations

from typing import Any

from mbridge_prune.errors import UserError

PARALLEL = {
    "tensor_model_parallel_size": "score with it (score(), --score-only) and prune from that scores file "
    "with pipeline, expert and data parallel ranks",
    "context_parallel_size": "use pipeline, expert and data parallel ranks",
}
"""Layouts that weights cannot be cut under, and what to do instead."""

PADDING = (
    "moe_pad_expert_input_to_capacity",
    "moe_router_padding_for_quantization",
    "moe_router_padding_for_fp8",
)
"""Settings with which experts read more rows than their tokens."""


def refuse_layout(config: Any, scoring: bool = False) -> None:
    """Refuses parallel layouts of a Megatron configuration, with what to use instead."""
    for name, hint in PARALLEL.items():
        value = getattr(config, name, 1) or 1
        if value > 1 and not (scoring and name.startswith("tensor")):
            raise UserError(f"{name}={value} is not supported for pruning; {hint}")
    tp, experts = getattr(config, "tensor_model_parallel_size", 1) or 1, getattr(config, "num_moe_experts", 0)
    for name in ("num_attention_heads", "num_query_groups", "mamba_num_heads", "mamba_num_groups"):
        value = getattr(config, name, None)
        if tp > 1 and value and value % tp and (not name.startswith("mamba") or _has_mamba(config)):
            fit = ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)
            raise UserError(f"tensor_model_parallel_size={tp} does not divide {name}={value}; choices: {fit}")
    if getattr(config, "sequence_parallel", False):
        raise UserError("sequence_parallel is not supported for scoring; leave it off")
    if experts and (getattr(config, "expert_tensor_parallel_size", None) or tp) > 1:
        raise UserError("experts are not scored in shards; set expert_tensor_parallel_size=1")
    ep = getattr(config, "expert_model_parallel_size", 1) or 1
    if ep > 1 and not experts:
        raise UserError(f"expert_model_parallel_size={ep}, but the model has no experts; use --ep 1")
    if ep > 1 and experts % ep:
        raise UserError(f"{experts} experts do not divide over expert_model_parallel_size={ep}")
    for name in PADDING:
        if getattr(config, name, False):
            raise UserError(f"experts whose tokens are padded are not supported: set {name}=False")
    if getattr(config, "virtual_pipeline_model_parallel_size", None):
        raise UserError("virtual pipeline stages are not supported for pruning; leave them unset")


def _has_mamba(config: Any) -> bool:
    return "M" in (getattr(config, "hybrid_override_pattern", None) or "")
