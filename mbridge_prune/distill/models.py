"""Both models: what their configs say, whether one can teach the other, and how they come into Megatron."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.bridge.checkpoint import check_shards, hf_config_of, iteration_folder
from mbridge_prune.bridge.load import (
    check_hf_folder,
    load_tokenizer,
    mark_unread,
    open_bridge,
    quiet,
    refuse_unread,
)
from mbridge_prune.distill.pair import Pair, check_same_stage, mark_vocabulary_shards
from mbridge_prune.distill.settings import Settings
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")


def vocabulary_fingerprint(tokenizer: Any) -> str | None:
    """Short SHA-256 of a tokenizer's words and their numbers; None without a tokenizer."""
    if tokenizer is None:
        return None
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def find_student(settings: Settings) -> None:
    """Puts the iteration and the config's folder of a student in a Megatron checkpoint into the settings.

    A later iteration is another run, as in prune.py.

    Raises:
        UserError: there is no checkpoint, or no config that describes it.
    """
    model = settings.model
    if model.student_megatron:
        iteration = iteration_folder(model.student_megatron)
        model.student = hf_config_of(model.student_megatron, model.student, "--student-hf-path")
        model.student_megatron = str(iteration)


def check_device(settings: Settings) -> None:
    """Refuses what needs a GPU where there is none.

    Raises:
        UserError: naming the flag.
    """
    if runtime.device().type == "cuda":
        return
    if settings.parallel.cp > 1:
        raise UserError("--cp needs Transformer Engine's attention, on GPUs; use --cp 1")
    if settings.parallel.sequence_parallel:
        raise UserError(
            "--sequence-parallel needs Transformer Engine, on GPUs; leave it off, the results are the same"
        )
    if settings.model.dtype == "bfloat16":
        raise UserError("--dtype bfloat16 trains on GPUs alone; use float32 on the CPU")


def check_family(settings: Settings, *, weights: bool = True) -> tuple[int, Any]:
    """Refuses a student that its teacher cannot teach: token for token, they must mean the same.

    Args:
        weights: whether their files are looked at, too, not the configs alone.

    Returns:
        (vocabulary size, the student's tokenizer or None)

    Raises:
        UserError: another vocabulary or tokenizer, images, a layout that one of them does not fit, or folders
            that are no models.
    """
    from transformers import AutoConfig

    model, sizes, tokenizers = settings.model, {}, {}
    for role, path in (("teacher", str(model.teacher)), ("student", str(model.student))):
        check_hf_folder(path, weights=weights and (role == "teacher" or not model.student_megatron))
        if weights:
            _check_shards(Path(path))
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"cannot read the {role}'s config in {path}: {str(error).splitlines()[0]}"
            ) from error
        if hasattr(config, "vision_config"):
            raise UserError(
                f"the {role} {path} reads images, which is not supported: distil a language model"
            )
        sizes[role] = config.vocab_size
        tokenizers[role] = load_tokenizer(path, model.trust_remote_code)
    if sizes["teacher"] != sizes["student"]:
        raise UserError(
            f"{model.student} is no child of {model.teacher}: its vocabulary has {sizes['student']} tokens, "
            f"the teacher's {sizes['teacher']}; take the model that the student was pruned from"
        )
    prints = {role: vocabulary_fingerprint(tokenizer) for role, tokenizer in tokenizers.items()}
    if None not in prints.values() and prints["teacher"] != prints["student"]:
        raise UserError(
            f"{model.student} is no child of {model.teacher}: their tokenizers number words differently; "
            "take the model that the student was pruned from"
        )
    if weights and model.student_megatron:
        check_shards(Path(model.student_megatron))
    tp = settings.parallel.tp
    if sizes["student"] % tp:
        fit = ", ".join(str(n) for n in range(1, 65) if sizes["student"] % n == 0)
        raise UserError(
            f"--tp {tp} does not divide the vocabulary of {sizes['student']} tokens; choices: {fit}"
        )
    for path in (str(model.teacher), str(model.student)):
        provider_of(path, settings, weights=False)
    return sizes["student"], tokenizers["student"]


def _check_shards(folder: Path) -> None:
    """Refuses a folder whose index names files that are not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise UserError(f"{index} is no index of safetensors files: {error}") from error
    lost = sorted(name for name in names if not (folder / name).is_file())
    if lost:
        raise UserError(f"{folder} lacks {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""))


def provider_of(path: str, settings: Settings, *, weights: bool) -> tuple[Any, Any]:
    """(bridge, provider) of a Hugging Face model at the layout that the settings ask for.

    Raises:
        UserError: what Megatron does not support of the model or the layout.
    """
    parallel = settings.parallel
    overrides = {"seq_length": settings.data.seq_length}
    if settings.model.dtype != "auto":
        overrides["params_dtype"] = getattr(torch, settings.model.dtype)
    bridge, provider = open_bridge(
        path, overrides, trust_remote_code=settings.model.trust_remote_code, weights=weights
    )
    if getattr(provider, "mtp_num_layers", None):
        raise UserError(
            f"{path} has multi-token-prediction heads, which are not distilled: set num_nextn_predict_layers "
            "to 0 in its config.json, and the model is distilled without them"
        )
    if parallel.ep > 1 and not provider.num_moe_experts:
        raise UserError(f"--ep {parallel.ep}: {path} has no experts; use --ep 1")
    if parallel.ep > 1 and provider.num_moe_experts % parallel.ep:
        raise UserError(
            f"--ep {parallel.ep} does not divide the {provider.num_moe_experts} experts of {path}"
        )
    for name in ("num_attention_heads", "num_query_groups"):
        value = getattr(provider, name, None)
        if value and value % parallel.tp:
            raise UserError(f"--tp {parallel.tp} does not divide {name}={value} of {path}")
    if provider.num_moe_experts and parallel.tp > 1 and not parallel.sequence_parallel:
        raise UserError("Megatron trains experts with tensor parallel ranks only with --sequence-parallel")
    provider.tensor_model_parallel_size = parallel.tp
    provider.pipeline_model_parallel_size = parallel.pp
    provider.context_parallel_size = parallel.cp
    provider.expert_model_parallel_size = parallel.ep
    provider.sequence_parallel = parallel.sequence_parallel
    provider.should_pad_vocab = False
    # Sums over the tokens of the global batch, so that no split of it changes the step.
    provider.calculate_per_token_loss = True
    _spread_layers(provider, path)
    try:
        provider.finalize()
    except (AssertionError, ValueError) as error:
        raise UserError(f"Megatron refuses this configuration of {path}: {error}") from error
    return bridge, provider


def _spread_layers(provider: Any, path: str) -> None:
    stages, layers = provider.pipeline_model_parallel_size, provider.num_layers
    if layers < stages:
        raise UserError(f"{path} has {layers} layers, fewer than --pp {stages}")
    first, last = end_stages(layers, stages)
    provider.num_layers_in_first_pipeline_stage, provider.num_layers_in_last_pipeline_stage = first, last


def end_stages(layers: int, stages: int) -> tuple[int | None, int | None]:
    """Layers of the first and of the last pipeline stage where they do not divide evenly (else None).

    Megatron wants as many layers on each stage between; the fullest stage gets as few as can be.
    """
    if layers % stages == 0:
        return None, None
    if stages == 2:
        return layers - layers // 2, layers // 2
    each = layers // stages
    ends = [(n, layers - (stages - 2) * n) for n in (each, each + 1)]
    _, rest = min((pair for pair in ends if pair[1] >= 2), key=lambda pair: max(pair[0], -(-pair[1] // 2)))
    return rest - rest // 2, rest // 2


def load_teacher(settings: Settings) -> nn.Module:
    """This rank's part of the teacher, with its weights; never trained."""
    from megatron.core.utils import unwrap_model

    path = settings.model.teacher or ""
    _, provider = provider_of(path, settings, weights=True)
    provider.register_pre_wrap_hook(mark_unread, prepend=True)
    with quiet():
        model = provider.provide_distributed_model(wrap_with_ddp=False)
    teacher = unwrap_model(model)[0]
    refuse_unread(teacher, path)
    return teacher.requires_grad_(False).eval()


class Student:
    """The model that pretrain builds: filled with the pruned weights, then paired with its teacher."""

    def __init__(self, settings: Settings, teacher: nn.Module, *, resumed: bool):
        self.settings, self.teacher = settings, teacher
        from_hf = not settings.model.student_megatron and not resumed
        # Where a checkpoint is going to be read, the folder need not hold weights: config and tokenizer do.
        self.bridge, self.provider = provider_of(settings.model.student or "", settings, weights=from_hf)
        if not from_hf:
            self.bridge.hf_pretrained = SimpleNamespace(config=self.bridge.hf_pretrained)  # for the export
        if settings.train.recompute:
            self.provider.recompute_granularity, self.provider.recompute_method = "full", "uniform"
            self.provider.recompute_num_layers = 1
        if not from_hf:
            self.provider.perform_initialization = False  # no random numbers for what is overwritten
            if not resumed:
                self.provider.register_pre_wrap_hook(self._read_megatron)
        else:
            self.provider.register_pre_wrap_hook(mark_unread, prepend=True)
        self.check_read = from_hf
        self.provider.register_pre_wrap_hook(self._paired)
        self.module: nn.Module | None = None

    def _read_megatron(self, chunks: list[nn.Module]) -> list[nn.Module]:
        from mbridge_prune.bridge.megatron import read_weights

        model = self.settings.model
        return read_weights(chunks, Path(model.student_megatron or ""), model.student or "")

    def _paired(self, chunks: list[nn.Module]) -> list[nn.Module]:
        (student,) = chunks
        if self.check_read:
            refuse_unread(student, self.settings.model.student or "")
        check_same_stage(student, self.teacher)
        mark_vocabulary_shards(student)
        self.module = student
        loss = self.settings.loss
        return [
            Pair(
                student,
                self.teacher,
                temperature=loss.temperature,
                top_k=loss.top_k,
                lm_loss=loss.lm_weight > 0,
            )
        ]
