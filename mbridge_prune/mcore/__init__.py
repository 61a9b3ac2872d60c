"""Wrappers of Megatron-core's layers, one file a module family; importing this registers them."""

from mbridge_prune.mcore import (
    attention,
    bridge_layers,
    delta_net,
    gpt,
    latent_attention,
    mamba,
    mlp,
    moe,
    multi_token,
    vision_language,
)
from mbridge_prune.mcore.gpt import root_scope
from mbridge_prune.mcore.parallel import refuse_layout
from mbridge_prune.mcore.vision_language import language_model
from mbridge_prune.mcore.whole_model import after_cut, reload_problem, set_sizes, whole_config

__all__ = [
    "after_cut",
    "attention",
    "bridge_layers",
    "delta_net",
    "gpt",
    "language_model",
    "latent_attention",
    "mamba",
    "mlp",
    "moe",
    "multi_token",
    "refuse_layout",
    "reload_problem",
    "root_scope",
    "set_sizes",
    "vision_language",
    "whole_config",
]
