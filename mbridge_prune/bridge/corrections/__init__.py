"""Megatron-Bridge's own bridges, with what version 0.3.1 reads wrongly from a config put right.

Importing this package registers a subclass in the place of each bridge concerned, as Megatron-Bridge
lets plugins do. The measure is transformers: the imported model must compute what it computes.
"""

from mbridge_prune.bridge.corrections import dense, experts, vision_language

__all__ = ["dense", "experts", "vision_language"]
