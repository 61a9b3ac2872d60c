"""Wrappers of Megatron-core's layers, one file a module family; importing this registers them."""

from mbridge_prune.mcore import attention, gpt, mlp
from mbridge_prune.mcore.gpt import after_depth, root_scope

__all__ = ["after_depth", "attention", "gpt", "mlp", "root_scope"]
