"""Hugging Face in: Megatron-Bridge builds the Megatron model of this rank and fills it."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.bridge.hf_config import lost_prediction_heads
from mbridge_prune.bridge.quiet import no_wrong_warning, quiet
from mbridge_prune.bridge.stages import check_stages
from mbridge_prune.errors import UserError, nearest

log = logging.getLogger("mbridge_prune")

FUSIONS = (
    "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion",
    "masked_softmax_fusion", "apply_rope_fusion", "persist_layer_norm", "cross_entropy_loss_fusion",
    "moe_permute_fusion", "moe_router_fusion",
)  # fmt: skip


class LoadedModel(NamedTuple):
    """What `load_mbridge_model_from_hf` returns, in the order its users unpack it."""

    bridge: Any
    provider: Any
    model: list[nn.Module]
    unwrapped_model: nn.Module
    tokenizer: Any


def load_mbridge_model_from_hf(
    *,
    hf_model_name_or_path: str | Path,
    provider_overrides: Mapping[str, Any] | None = None,
    moe_grouped_gemm: bool = True,
    trust_remote_code: bool = False,
    init_model_parallel: bool = True,
) -> LoadedModel:
    """Imports a Hugging Face causal language model into Megatron-core on this rank.

    Args:
        hf_model_name_or_path: a local folder or a hub name.
        provider_overrides: fields of the Megatron-Bridge provider, such as
            `pipeline_model_parallel_size`, `pipeline_dtype`, `seq_length`,
            `num_layers_in_first_pipeline_stage`.
        moe_grouped_gemm: keep an MoE layer's experts in one grouped GEMM.
        trust_remote_code: passed on to transformers.
        init_model_parallel: start torch.distributed and Megatron's groups where nobody has yet.

    Returns:
        (bridge, provider, model, unwrapped_model, tokenizer); `model` is Megatron's list of chunks.

    Raises:
        UserError: no such folder, broken weights, an architecture Bridge does not know, an
            override that is no field of the provider, or a layout the world does not fit.
    """
    bridge, provider = open_bridge(
        hf_model_name_or_path, provider_overrides, moe_grouped_gemm, trust_remote_code, weights=True
    )
    start_layout(bridge, provider, init_model_parallel)
    try:
        with quiet():
            model = provider.provide_distributed_model(wrap_with_ddp=False)
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        if "safetensor" in str(error).lower() or "header" in str(error).lower():
            raise UserError(f"cannot read the weights in {hf_model_name_or_path}: {error}") from error
        raise
    except AttributeError as error:
        if "megatron_module" not in str(error):
            raise
        raise UserError(
            f"Megatron-Bridge has no mapping for some weights of {hf_model_name_or_path} (biases that the "
            "architecture does not usually have?): it cannot import this model"
        ) from error
    unwrapped = ready(model, hf_model_name_or_path)
    tokenizer = load_tokenizer(hf_model_name_or_path, trust_remote_code)
    return LoadedModel(bridge, provider, model, unwrapped, tokenizer)


def start_layout(bridge: Any, provider: Any, init_model_parallel: bool = True) -> None:
    """Before a model is built: refuses its layout, or starts it; what is not read afterwards will show."""
    check_layout(provider)
    warn_of_lost_heads(bridge, provider)
    if init_model_parallel:
        runtime.start_model_parallel(
            provider.pipeline_model_parallel_size, provider.tensor_model_parallel_size or 1,
            provider.expert_model_parallel_size or 1,
        )  # fmt: skip
    provider.register_pre_wrap_hook(mark_unread, prepend=True)


def ready(model: list[nn.Module], source: str | Path) -> nn.Module:
    """The unwrapped model in evaluation mode, once every weight of it was read."""
    from megatron.core.utils import unwrap_model

    unwrapped = unwrap_model(model)[0]
    unwrapped.eval()
    refuse_unread(unwrapped, source)
    return unwrapped


def warn_of_lost_heads(bridge: Any, provider: Any) -> None:
    """Says which multi-token-prediction heads Megatron-Bridge does not import: the export has none."""
    source, none_built = bridge.hf_pretrained, not getattr(provider, "mtp_num_layers", None)
    lost = lost_prediction_heads(getattr(source, "config", source), provider)
    if not lost and none_built and hasattr(source, "state"):  # Qwen3-Next's config does not tell
        lost = int(any(key.startswith("mtp.") for key in source.state.source.get_all_keys()))
    if lost:
        log.warning("multi-token-prediction heads that Megatron-Bridge does not import are dropped: %d", lost)


def mark_unread(chunks: list[nn.Module]) -> list[nn.Module]:
    """Before the weights are read: makes every parameter show whether it was."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    return chunks


def refuse_unread(model: nn.Module, path: str | Path) -> None:
    """Bridge only warns where a checkpoint lacks a weight, and leaves it random."""
    unread = [name for name, p in model.named_parameters() if p.numel() and p.flatten()[0].isnan()]
    if unread:
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        raise UserError(f"{path} has no weights (or NaN) for: {', '.join(unread[:3])}{more}")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, or None where it has none (token files can still calibrate)."""
    from transformers import AutoTokenizer

    try:
        with no_wrong_warning(Path(path)):
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Where the files are missing, transformers raises the last two from inside its tokenizers.
        log.info("no tokenizer in %s (%s)", path, str(error).strip().partition("\n")[0])
        return None


def open_bridge(
    path: str | Path,
    overrides: Mapping[str, Any] | None,
    moe_grouped_gemm: bool = True,
    trust_remote_code: bool = False,
    *,
    weights: bool,
) -> tuple[Any, Any]:
    """(bridge, provider) of a Hugging Face model; reads its config and, later, its weights.

    Args:
        weights: False reads the config alone.
    """
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    from mbridge_prune.bridge import corrections  # noqa: F401  (registers them)

    check_hf_folder(path, weights)
    try:
        with one_rank_first(trust_remote_code):
            hf_config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the model config of {path}: {first}") from error
    if not AutoBridge.supports(hf_config):
        known = AutoBridge.list_supported_models()
        have = (getattr(hf_config, "architectures", None) or ["none"])[0]
        raise UserError(
            f"Megatron-Bridge does not know the architecture {have}{nearest(have, known)}; "
            f"it knows: {', '.join(sorted(known))}"
        )
    with quiet():
        try:
            if weights:
                bridge = AutoBridge.from_hf_pretrained(str(path), trust_remote_code=trust_remote_code)
            else:
                bridge = AutoBridge.from_hf_config(hf_config)
            provider = bridge.to_megatron_provider(load_weights=weights)
        except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"Megatron-Bridge cannot import {path}: {first}") from error
        apply_overrides(provider, overrides or {}, moe_grouped_gemm)
    return bridge, provider


def apply_overrides(provider: Any, overrides: Mapping[str, Any], moe_grouped_gemm: bool) -> None:
    """Sets this machine's defaults, then the user's overrides, and finalises the provider."""
    from megatron.core.transformer.enums import AttnBackend

    dtype = overrides.get("params_dtype") or overrides.get("pipeline_dtype") or runtime.default_dtype()
    provider.params_dtype = provider.pipeline_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    if runtime.device().type == "cpu":
        for name in FUSIONS:
            if hasattr(provider, name):
                setattr(provider, name, False)
        if hasattr(provider, "cross_entropy_fusion_impl"):
            provider.cross_entropy_fusion_impl = "native"
        if hasattr(provider, "attention_backend"):
            # Excluding backends of GPUs would only outlive this model, in the environment.
            provider.attention_backend = AttnBackend.auto
    if hasattr(provider, "moe_grouped_gemm"):
        provider.moe_grouped_gemm = moe_grouped_gemm
    if getattr(provider, "num_moe_experts", None):
        provider.expert_tensor_parallel_size = 1
        # Its side stream computes the shared expert piece by piece, past its forward.
        provider.moe_shared_expert_overlap = False
    provider.sequence_parallel = False
    for name, value in overrides.items():
        if not hasattr(provider, name):
            fields = [n for n in dir(provider) if not n.startswith("_")]
            raise UserError(
                f"provider_overrides: {name!r} is no field of {type(provider).__name__}"
                + nearest(name, fields)
            )
        setattr(provider, name, value)
    if getattr(provider, "hybrid_override_pattern", None):
        # Megatron-LM's pipeline separators: the stages are chosen by --pp here.
        provider.hybrid_override_pattern = provider.hybrid_override_pattern.replace("|", "")
    if not getattr(provider, "moe_grouped_gemm", True):
        _separate_experts(provider)
    provider.gradient_accumulation_fusion = False
    mcore.refuse_layout(provider, scoring=True)
    check_stages(provider)
    if hasattr(provider, "finalize"):
        try:
            provider.finalize()
        except (AssertionError, ValueError) as error:
            raise UserError(f"Megatron refuses this configuration: {error}") from error


def _separate_experts(provider: Any) -> None:
    """Has the experts built one by one where Bridge would group them whatever `moe_grouped_gemm` says."""
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLMoEModelProvider

    if hasattr(provider, "mamba_stack_spec"):
        provider.mamba_stack_spec = separate_experts_spec
    elif isinstance(provider, Qwen3VLMoEModelProvider):
        raise UserError("Megatron-Bridge groups the experts of Qwen3-VL-MoE; leave moe_grouped_gemm=True")


def separate_experts_spec(provider: Any) -> Any:
    """Megatron's spec of a hybrid stack, which always groups experts, with separate ones."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec

    spec = copy.deepcopy(mamba_stack_spec)
    if provider.num_moe_experts:
        spec.submodules.moe_layer.submodules.mlp = get_moe_module_spec(
            use_te=True, num_experts=provider.num_moe_experts, moe_grouped_gemm=False
        )
    return spec


def check_layout(provider: Any, scoring: bool = True) -> None:
    """Refuses parallel layouts that do not fit the model, before any weights are read.

    Args:
        scoring: False also refuses what a model can be scored under, but not cut.
    """
    mcore.refuse_layout(provider, scoring)
    check_stages(provider)


def check_hf_folder(path: str | Path, weights: bool = True) -> None:
    """Refuses a missing folder and broken safetensors before anything is built from them."""
    from safetensors import SafetensorError, safe_open

    folder = Path(path)
    if not folder.exists():
        if str(path).count("/") == 1 and not str(path).startswith((".", "/", "~")):
            return  # a hub name: transformers resolves it
        raise UserError(f"no such model folder: {path}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{path} has no config.json: it is not a Hugging Face model folder")
    if not weights:
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path} has no .safetensors file: convert its weights to safetensors first")
    for file in files:
        try:
            with safe_open(str(file), "pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is not a readable safetensors file: {error}") from error


@contextlib.contextmanager
def one_rank_first(needed: bool) -> Iterator[None]:
    """transformers copies a model's own code into a cache without a lock: one rank of a machine first."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if needed and not first:
        runtime.barrier()
    yield
    if needed and first:
        runtime.barrier()
