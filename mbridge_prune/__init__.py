"""mbridge_prune: structured pruning of Megatron-core language models through Megatron-Bridge."""

from mbridge_prune import reference

reference.enable()
