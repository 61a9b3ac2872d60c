"""Whether a Hugging Face config can say the sizes that a plan has, found out before anything is read."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from mbridge_prune import mcore
from mbridge_prune.bridge.export import auto_class
from mbridge_prune.bridge.hf_config import check_shared_size, pruned_hf_config, text_config
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")


def check_expressible(
    source: Any, provider: Any, plan: Any, prediction_heads: int, trust_remote_code: bool = False
) -> None:
    """Builds transformers' class of the pruned config on the meta device and counts it.

    Args:
        source: the Hugging Face config of the unpruned model, or what holds it as `config`.
        provider: the unpruned Megatron configuration.
        plan: its `sizes_after`, `layers_kept` and `params_after`.
        prediction_heads: of these, parameters that transformers' class leaves out.

    Raises:
        UserError: the architecture derives a size that the plan has otherwise (a head's channels
            from hidden_size and heads), or another field cannot be said.
    """
    original = getattr(source, "config", source)
    check_shared_size(original, plan.sizes_after)
    megatron = copy.copy(provider)
    mcore.set_sizes(megatron, plan.sizes_after)
    config = pruned_hf_config(original, megatron, plan.layers_kept)
    name = (getattr(original, "architectures", None) or [type(original).__name__])[0]
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except ImportError as error:
        log.info("the export's config is checked when it is written: %s", str(error).splitlines()[0])
        return
    except ValueError as error:
        raise UserError(f"{name} cannot have these sizes: {' '.join(str(error).split())}") from error
    says, planned = model.num_parameters(), plan.params_after - prediction_heads
    if says != planned:
        raise UserError(
            f"the config of {name} cannot say these sizes: it would describe {says:,} parameters, the plan "
            f"has {planned:,}{_head_hint(config, megatron)}"
        )


def _head_hint(config: Any, megatron: Any) -> str:
    hidden, heads = text_config(config).hidden_size, megatron.num_attention_heads
    channels = megatron.kv_channels
    if getattr(megatron, "multi_latent_attention", False) or hidden == heads * channels:
        return ""
    both = f"prune both so that hidden_size = {channels} x num_attention_heads"
    neither = "the hidden size of a vision-language model stays, and so do its heads"
    return (
        f"; it derives a head's channels as hidden_size / num_attention_heads = {hidden} / {heads}, the "
        f"model has {channels}: {neither if hasattr(config, 'vision_config') else both}"
    )
