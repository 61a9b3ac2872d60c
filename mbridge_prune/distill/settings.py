"""Settings of a distillation, in the manner of `config.py`: a field is a YAML key, an override and a flag."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mbridge_prune import config
from mbridge_prune.config import option
from mbridge_prune.errors import UserError

DISTILLATIONS = config.RECIPES / "distill"
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(kw_only=True)
class Model:
    """The parent that teaches, and the pruned model that learns."""

    teacher: str | None = option(
        None, "Hugging Face folder or hub name of the parent", "--teacher-hf-path", "--teacher"
    )
    student: str | None = option(
        None, "Hugging Face folder of the pruned model", "--student-hf-path", "--student"
    )
    student_megatron: str | None = option(
        None,
        "or its Megatron checkpoint; --student-hf-path then gives a config that is not beside it",
        "--student-megatron-path",
        "--megatron-path",
    )
    trust_remote_code: bool = option(
        False, "let transformers run the models' own code", "--trust-remote-code"
    )
    dtype: str = option(
        "auto", "auto is bfloat16 on GPUs, float32 on the CPU", "--dtype",
        choices=("auto", "float32", "bfloat16"),
    )  # fmt: skip


@dataclass(kw_only=True)
class Parallel:
    """How both models are spread over ranks; what is left of the world is data parallel."""

    tp: int = option(1, "tensor parallel ranks", "--tp", "--tensor-model-parallel-size")
    pp: int = option(1, "pipeline stages", "--pp", "--pipeline-model-parallel-size")
    cp: int = option(1, "context parallel ranks (GPUs)", "--cp", "--context-parallel-size")
    ep: int = option(
        1,
        "expert parallel ranks, taken out of the data parallel ones",
        "--ep",
        "--expert-model-parallel-size",
    )
    sequence_parallel: bool = option(
        False, "with tp, split what lies between the matrices along the sequence", "--sequence-parallel"
    )
    world_size: int | None = option(
        None,
        "ranks of the job, for --dry-run (default: one replica); a run with others is refused",
        "--world-size",
    )

    def fewest_ranks(self) -> int:
        """Of the worlds that this layout fits, the smallest."""
        return math.lcm(self.tp * self.pp * self.cp, self.pp * self.ep)


@dataclass(kw_only=True)
class Data:
    """Megatron indexed datasets (.bin and .idx), see launch/prepare_data.py."""

    train: list[str] = option(
        [], "path prefixes with commas between, or weight,prefix,weight,prefix,...", "--data", "--data-path"
    )
    valid: list[str] = option([], "likewise, to validate on", "--valid-data")
    seq_length: int = option(8192, "tokens a sequence (4096 where documents are shorter)", "--seq-length")
    seed: int = option(1234, "order of the samples", "--seed")
    cache: str | None = option(
        None, "folder of the samples' index (default: data_cache in the run folder)", "--data-cache"
    )
    num_workers: int = option(2, "loading processes a rank", "--num-workers", least=0)


@dataclass(kw_only=True)
class Loss:
    """What the student learns from."""

    temperature: float = option(1.0, "softens both distributions; the loss is scaled by its square",
                                "--temperature", least=1e-3)  # fmt: skip
    lm_weight: float = option(
        0.0,
        "share of the next-token loss; the rest is the divergence from the teacher",
        "--lm-weight",
        least=0,
    )
    top_k: int = option(0, "only the teacher's k likeliest tokens, renormalised (0: all)", "--top-k", least=0)


@dataclass(kw_only=True)
class Train:
    """Steps, batches, optimizer."""

    tokens: str | None = option(None, "tokens to train on, such as 80e9: decides the steps", "--tokens")
    steps: int | None = option(None, "optimizer steps, in place of tokens", "--steps", "--train-iters")
    global_batch_size: int = option(768, "sequences a step", "--global-batch-size", "--gbs")
    micro_batch_size: int = option(1, "sequences a microbatch, as many as fit", "--micro-batch-size", "--mbs")
    lr: float = option(1e-4, "learning rate after the warm-up", "--lr", least=0)
    min_lr: float = option(1e-5, "learning rate at the end", "--min-lr", least=0)
    schedule: str = option("linear", "decay from lr to min_lr", "--lr-decay-style", choices=SCHEDULES)
    warmup_steps: int = option(100, "steps of linear warm-up", "--warmup-steps", least=0)
    weight_decay: float = option(0.1, "of matrices", "--weight-decay", least=0)
    beta1: float = option(0.9, "Adam's first moment", "--adam-beta1", least=0)
    beta2: float = option(0.95, "Adam's second moment", "--adam-beta2", least=0)
    clip_grad: float = option(1.0, "largest norm of the gradient (0: not clipped)", "--clip-grad", least=0)
    recompute: bool = option(
        False,
        "keep no activations inside the student's layers, compute them again",
        "--recompute-activations",
    )
    seed: int = option(1234, "of random numbers (dropout)", "--train-seed")


@dataclass(kw_only=True)
class Validate:
    """Loss on text kept aside."""

    interval: int = option(200, "steps between validations", "--eval-interval")
    steps: int = option(8, "global batches a validation (0: none)", "--eval-iters", least=0)


@dataclass(kw_only=True)
class Output:
    """What the run leaves."""

    path: str | None = option(None, "run folder: checkpoints/, hf/, losses.jsonl, report.html, run.log",
                              "--output", "-o")  # fmt: skip
    hf_path: str | None = option(None, "the distilled Hugging Face model (default: hf/ in the run folder)",
                                 "--output-hf-path")  # fmt: skip
    save_interval: int = option(500, "steps between checkpoints", "--save-interval")
    keep: int = option(2, "checkpoints kept, the newest", "--keep-checkpoints")
    stop_file: str | None = option(
        None, "end behind a checkpoint, as on SIGTERM, after the step that finds this file", "--stop-file"
    )
    log_interval: int = option(10, "steps between lines of the log", "--log-interval")
    wandb_project: str | None = option(None, "also a run of this Weights & Biases project", "--wandb-project")


@dataclass(kw_only=True)
class Settings(config.Command):
    """All settings of `launch/distill.py`."""

    PROGRAM: ClassVar[str] = "distill.py"
    DESCRIPTION: ClassVar[str] = "Distils a pruned model from its parent in Megatron-Bridge's training loop."
    EXAMPLE: ClassVar[str] = "train.lr=2e-4"
    RECIPES: ClassVar[Path] = DISTILLATIONS
    MAY_CHANGE: ClassVar[dict[str, tuple[str, ...]]] = {
        "parallel": ("tp", "pp", "cp", "ep", "sequence_parallel", "world_size"),
        "data": ("cache", "num_workers"),
        "train": ("micro_batch_size", "recompute"),
        "validate": ("interval", "steps"),
        "output": ("path", "hf_path", "save_interval", "keep", "stop_file", "log_interval", "wandb_project"),
    }
    """Settings that a resumed run may have otherwise: they do not change what is learnt."""

    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    validate: Validate = field(default_factory=Validate)
    output: Output = field(default_factory=Output)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def run_folder(self) -> Path:
        if not self.output.path:
            raise UserError("no output folder: give --output")
        return Path(self.output.path)

    def hf_folder(self) -> Path:
        return Path(self.output.hf_path) if self.output.hf_path else self.run_folder() / "hf"

    def checkpoints(self) -> Path:
        return self.run_folder() / "checkpoints"

    def tokens_a_step(self) -> int:
        return self.data.seq_length * self.train.global_batch_size

    def steps(self) -> int:
        """Optimizer steps: given, or tokens / (sequence length x global batch), rounded up.

        Raises:
            UserError: neither or both are given, or tokens is no number.
        """
        tokens, steps = self.train.tokens, self.train.steps
        if (tokens is None) == (steps is None):
            raise UserError("give one of --tokens (such as 80e9) and --steps")
        if steps is not None:
            return steps
        try:
            number = float(str(tokens))
        except ValueError:
            raise UserError(f"train.tokens={tokens!r} is no number: give one such as 80e9") from None
        if not 0 < number < float("inf"):
            raise UserError(f"train.tokens={tokens!r} must be above 0")
        return -(-int(number) // self.tokens_a_step())


def what_is_learnt(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings (as `to_dict` gives them) less those that a resumed run may have otherwise."""
    return {
        part: {k: v for k, v in values.items() if k not in Settings.MAY_CHANGE.get(part, ())}
        for part, values in settings.items()
    }


def check(settings: Settings) -> None:
    """What can be refused from the settings alone.

    Raises:
        UserError: the first contradiction, with what would work.
    """
    if not settings.model.teacher:
        raise UserError("no teacher: give --teacher-hf-path FOLDER, the model that was pruned")
    if not settings.model.student and not settings.model.student_megatron:
        raise UserError("no student: give --student-hf-path or --student-megatron-path, the pruned model")
    settings.steps()
    if settings.loss.lm_weight > 1:
        raise UserError(f"loss.lm_weight={settings.loss.lm_weight} is no share: give 0 to 1")
    if settings.loss.lm_weight == 1:
        raise UserError("loss.lm_weight=1 leaves nothing to learn from the teacher: give less than 1")
    if settings.train.min_lr > settings.train.lr:
        raise UserError(f"train.min_lr={settings.train.min_lr} is above train.lr={settings.train.lr}")
    if settings.train.warmup_steps >= settings.steps():
        raise UserError(
            f"train.warmup_steps={settings.train.warmup_steps} leaves nothing of {settings.steps()} steps: "
            "give fewer (--warmup-steps)"
        )
    if settings.parallel.sequence_parallel and settings.parallel.tp == 1:
        raise UserError("--sequence-parallel needs --tp of 2 or more")


def check_batches(settings: Settings, world: int) -> int:
    """Data parallel ranks of a world, into which the batches must divide.

    Raises:
        UserError: the world or the global batch does not divide.
    """
    parallel, train = settings.parallel, settings.train
    ranks = parallel.tp * parallel.pp * parallel.cp
    if parallel.world_size not in (None, world):
        raise UserError(f"--world-size {parallel.world_size}, and this job has {world} ranks: leave it out")
    if world % ranks:
        raise UserError(
            f"world size {world} is not a multiple of tensor {parallel.tp} x pipeline {parallel.pp} x "
            f"context {parallel.cp} parallel size; start a multiple of {ranks} processes "
            "(torchrun --nproc-per-node)"
        )
    if world % (parallel.pp * parallel.ep):
        raise UserError(
            f"world size {world} is not a multiple of pipeline {parallel.pp} x expert {parallel.ep} parallel "
            f"size; start a multiple of {parallel.pp * parallel.ep} processes"
        )
    replicas = world // ranks
    at_once = replicas * train.micro_batch_size
    if train.global_batch_size % at_once:
        raise UserError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of {replicas} data "
            f"parallel ranks x micro_batch_size {train.micro_batch_size} = {at_once}; nearest multiple: "
            f"{max(1, round(train.global_batch_size / at_once)) * at_once}"
        )
    return replicas
