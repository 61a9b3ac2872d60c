"""After the cut: sizes of layers of other stages, pipeline layout, per-layer patterns in step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mbridge_prune.dynamic import Pattern

FREQUENCIES: dict[str, Callable[[int, int], int]] = {
    "moe_layer_freq": lambda layer, every: int(layer % every == 0),
    "window_attn_skip_freq": lambda layer, every: int((layer + 1) % every != 0),
    "no_rope_freq": lambda layer, every: int((layer + 1) % every == 0),
    "linear_attention_freq": lambda layer, every: int((layer + 1) % every != 0),
}
"""Fields that say what every layer (from 0) is: a list of 0 and 1, or a period that means one."""

HYBRID = "hybrid_override_pattern"

NUMBERED = ("Gemma3SelfAttention",)
"""Modules whose forward asks their own layer number which pattern they follow."""


def reads_layer_number(module: nn.Module) -> bool:
    """True where a module's layer number is part of its function and must not change."""
    return type(module).__name__ in NUMBERED


def patterns(config: Any, *owners: Any) -> Iterator[Pattern]:
    """Every per-layer list of a model, at full length.

    Args:
        owners: modules that keep the hybrid pattern besides the configuration.
    """
    for name, flag in FREQUENCIES.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            yield Pattern(config, name, [flag(layer, value) for layer in range(config.num_layers)])
        elif isinstance(value, (list, tuple)):
            yield Pattern(config, name, list(value))
    for owner in (config, *owners):
        if getattr(owner, HYBRID, None):
            yield Pattern(owner, HYBRID, getattr(owner, HYBRID).replace("|", ""))


@contextlib.contextmanager
def whole_config(model: nn.Module, sizes: Mapping[str, int]) -> Iterator[None]:
    """Inside, the configuration says the sizes of layers that only other stages hold, too."""
    config = model.config
    before = {name: getattr(config, name) for name in (*sizes, "num_query_groups") if hasattr(config, name)}
    set_sizes(config, sizes)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def set_sizes(config: Any, sizes: Mapping[str, int]) -> None:
    """Writes every hparam's size into a Megatron configuration: the field has its name."""
    for hparam, size in sizes.items():
        setattr(config, hparam, size)
    if "num_query_groups" not in sizes and "num_attention_heads" in sizes:
        config.num_query_groups = sizes["num_attention_heads"]  # multi-head or latent attention


def after_cut(model: nn.Module, stage_layers: Sequence[int], sizes: Mapping[str, int]) -> None:
    """Tells Megatron on every stage what the whole model is now.

    Args:
        model: the language model of this stage.
        stage_layers: layers of every stage, in stage order.
        sizes: every hparam and its size, also of layers that only other stages hold.
    """
    set_sizes(model.config, sizes)
    stack = model.decoder
    if hasattr(stack, "num_layers_per_pipeline_rank"):  # how far activation recompute goes
        stack.num_layers_per_pipeline_rank = len(stack.layers)
    if hasattr(stack, "layer_type_list"):
        stack.layer_type_list = _layer_types(stack)
        model.hybrid_override_pattern = model.config.hybrid_override_pattern
    if len(stage_layers) > 1:
        _lay_out(model.config, stage_layers)


def _layer_types(stack: nn.Module) -> list[str]:
    """The symbols of a hybrid stack's own layers, read off the layers themselves."""
    from megatron.core.ssm.mamba_layer import MambaLayer
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.moe.moe_layer import MoELayer

    def symbol(layer: nn.Module) -> str:
        if isinstance(layer, MambaLayer):
            return "M"
        if isinstance(layer.mlp, MoELayer):
            return "E"
        return "*" if isinstance(layer.mlp, IdentityOp) else "-"

    return [symbol(layer) for layer in stack.layers]


def _lay_out(config: Any, stage_layers: Sequence[int]) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    stages = [["decoder"] * n for n in stage_layers]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * (getattr(config, "mtp_num_layers", None) or 0) + ["loss"]
    layout = PipelineParallelLayerLayout(stages, len(stage_layers))
    config.pipeline_model_parallel_layout = layout
    config.num_layers_in_first_pipeline_stage = None
    config.num_layers_in_last_pipeline_stage = None


def reload_problem(model: nn.Module) -> str | None:
    """Why a Megatron checkpoint of this model would be rebuilt as another one; None if it would not.

    Gemma 3 derives every layer's window and rotary base from its position and one period.
    """
    for module in model.modules():
        if reads_layer_number(module):
            period = sum(model.config.interleaved_attn_pattern)
            break
    else:
        return None
    for layer in model.decoder.layers:
        number = layer.self_attention.layer_number
        if (number % period == 0) != (layer.layer_number % period == 0):
            return (
                f"layer {number} of the unpruned model (local or global attention by its number) now stands "
                f"at {layer.layer_number}, where Megatron-Bridge would build the other kind; the Hugging "
                "Face export says the kind of every layer and is right"
            )
    return None
