"""What a distillation will do and need, from the configs alone: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from mbridge_prune import dry_run, runtime
from mbridge_prune.bridge.load import open_bridge
from mbridge_prune.distill.models import end_stages
from mbridge_prune.distill.report import loss_in_words
from mbridge_prune.distill.settings import Settings

GIB = 2**30


def activations(tp: int, sequence_parallel: bool) -> float:
    """Bytes that a rank keeps of a layer for the backward pass, a token and hidden channel, in bf16.

    Without the attention matrix. Tensor parallel ranks share what the matrices need; the input of norms and
    dropouts, 10 bytes, they share with sequence parallelism alone (Korthikanti et al., arXiv 2205.05198,
    equations 2 and 4).
    """
    return 34 / tp if sequence_parallel else 10 + 24 / tp


@dataclass
class Memory:
    """GiB a rank of one pipeline stage."""

    teacher: float
    student: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def plan_table(settings: Settings, world: int, replicas: int) -> Table:
    """Steps, tokens, batches and rates of a run."""
    train, steps = settings.train, settings.steps()
    table = Table(title="plan", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {
        "ranks": f"{world} = tensor {settings.parallel.tp} x pipeline {settings.parallel.pp} x context "
        f"{settings.parallel.cp} x data {replicas}",
        "steps": f"{steps:,}",
        "tokens a step": f"{settings.tokens_a_step():,} = {settings.data.seq_length:,} x "
        f"{train.global_batch_size:,}",
        "tokens": f"{steps * settings.tokens_a_step():,}",
        "microbatches a step": f"{train.global_batch_size // (replicas * train.micro_batch_size):,} of "
        f"{train.micro_batch_size}",
        "learning rate": f"{train.lr:g} to {train.min_lr:g}, {train.schedule}, {train.warmup_steps} steps of "
        "warm-up",
        "dtype": settings.model.dtype,
        "loss": loss_in_words(settings),
        "validations": f"{steps // settings.validate.interval if settings.validate.steps else 0}",
        "checkpoints": f"every {settings.output.save_interval} steps, the newest {settings.output.keep} kept",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def memory(settings: Settings, replicas: int) -> list[Memory]:
    """Of every pipeline stage of a job on GPUs, with the distributed optimizer (float32: of one on CPUs).

    Weights, gradients and optimizer are exact; activations are about right.
    """
    student, provider = _stages(settings, settings.model.student or "")
    teacher, _ = _stages(settings, settings.model.teacher or "")
    parallel, train = settings.parallel, settings.train
    width = student.bytes_per_param
    mixed = width == 2
    tokens = settings.data.seq_length * train.micro_batch_size / parallel.cp
    shares = replicas * parallel.cp if mixed or runtime.device().type == "cuda" else 1
    of_layer = activations(parallel.tp, parallel.sequence_parallel)
    of_input = 2 / parallel.tp if parallel.sequence_parallel else 2
    result = []
    for place, (ours, theirs) in enumerate(zip(student.stages, teacher.stages, strict=True)):
        last = place == parallel.pp - 1
        layer = tokens * provider.hidden_size * width / 2
        kept = of_layer * ours.layers
        if train.recompute:  # a layer's input, and all of the one layer that is being computed again
            kept = of_input * ours.layers + of_layer
        # fp32: two moments; mixed precision: a master copy as well.
        state = ours.params * (12 if mixed else 8) / shares
        logits = 3 * tokens * provider.vocab_size / parallel.tp * width if last else 0
        result.append(Memory(
            teacher=theirs.params * teacher.bytes_per_param / GIB,
            student=ours.params * width / GIB,
            gradients=ours.params * 4 / GIB,
            optimizer=state / GIB,
            activations=layer * kept * min(parallel.pp - place, _microbatches(settings, replicas)) / GIB,
            logits=logits / GIB,
        ))  # fmt: skip
    return result


def _microbatches(settings: Settings, replicas: int) -> int:
    return settings.train.global_batch_size // (replicas * settings.train.micro_batch_size)


def _stages(settings: Settings, path: str) -> tuple[dry_run.Forecast, Any]:
    parallel = settings.parallel
    trust = settings.model.trust_remote_code
    dtype = settings.model.dtype
    width = {} if dtype == "auto" else {"params_dtype": getattr(torch, dtype)}
    _, provider = open_bridge(path, width, trust_remote_code=trust, weights=False)
    first, last = end_stages(provider.num_layers, parallel.pp)
    overrides = width | {
        "pipeline_model_parallel_size": parallel.pp,
        "tensor_model_parallel_size": parallel.tp,
        "expert_model_parallel_size": parallel.ep,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
    }
    return dry_run.forecast(path, {}, provider_overrides=overrides, trust_remote_code=trust), provider


def memory_table(stages: list[Memory]) -> Table:
    """A row a stage."""
    table = Table(title="memory a rank, GiB (activations and logits: about)")
    table.add_column("stage", justify="right")
    for name in (*vars(stages[0]), "total"):
        table.add_column(name, justify="right")
    for place, stage in enumerate(stages):
        table.add_row(str(place), *(f"{value:.2f}" for value in (*vars(stage).values(), stage.total)))
    return table
