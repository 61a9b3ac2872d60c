"""Megatron-Bridge's `pretrain`, configured for a distillation."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mbridge_prune import runtime
from mbridge_prune.bridge.load import quiet
from mbridge_prune.bridge.training_loop import TRAINING, helpers_compiled, import_bridge
from mbridge_prune.distill.checkpoints import drop_half_written, written_to_the_end
from mbridge_prune.distill.settings import Settings
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
STOPPED = 143
"""Exit code of a run that SIGTERM ended after a checkpoint: it is not finished."""


class Stopped(Exception):
    """The run was told to stop, has saved a checkpoint and goes on from there next time."""


def configure(settings: Settings, provider: Any, vocab_size: int, begin: int) -> Any:
    """The `ConfigContainer` of a run.

    Args:
        begin: the step of the checkpoint that it goes on from, 0 for none.
    """
    from megatron.bridge.training import config as bridge
    from megatron.bridge.training.tokenizers.config import TokenizerConfig

    train, folder = settings.train, settings.run_folder()
    gpu, bf16, steps = (
        runtime.device().type == "cuda",
        provider.params_dtype == torch.bfloat16,
        settings.steps(),
    )
    checkpoints = str(settings.checkpoints())
    return bridge.ConfigContainer(
        model=provider,
        rng=bridge.RNGConfig(seed=train.seed),
        train=bridge.TrainingConfig(
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
            train_iters=steps,
            eval_interval=settings.validate.interval,
            eval_iters=settings.validate.steps,
            exit_signal_handler=True,
            exit_signal_handler_for_dataloader=True,  # torchrun signals the whole process group
        ),
        optimizer=bridge.OptimizerConfig(
            optimizer="adam",
            lr=train.lr,
            min_lr=train.min_lr,
            weight_decay=train.weight_decay,
            adam_beta1=train.beta1,
            adam_beta2=train.beta2,
            clip_grad=train.clip_grad,
            bf16=bf16,
            params_dtype=provider.params_dtype,
            use_distributed_optimizer=gpu,
        ),
        scheduler=bridge.SchedulerConfig(
            lr_decay_style=train.schedule,
            lr_decay_iters=steps,
            lr_warmup_iters=train.warmup_steps,
            start_weight_decay=train.weight_decay,
            end_weight_decay=train.weight_decay,
        ),
        ddp=bridge.DistributedDataParallelConfig(
            use_distributed_optimizer=gpu,
            overlap_grad_reduce=gpu,
            overlap_param_gather=gpu,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,  # progress.py says it in one line
        ),
        dataset=dataset(settings),
        logger=bridge.LoggerConfig(
            log_interval=settings.output.log_interval,
            tensorboard_dir=str(folder / "tensorboard"),
            wandb_project=settings.output.wandb_project,
            wandb_exp_name=folder.name,
            wandb_save_dir=str(folder / "wandb") if settings.output.wandb_project else None,
            logging_level=logging.WARNING,
            filter_warnings=False,  # it would silence those of every logger of the process, ours too
        ),
        tokenizer=TokenizerConfig(
            tokenizer_type="NullTokenizer", vocab_size=vocab_size, legacy_tokenizer=True
        ),
        checkpoint=bridge.CheckpointConfig(
            save=checkpoints if begin < steps else None,
            load=checkpoints if begin else None,
            save_interval=settings.output.save_interval,
            most_recent_k=settings.output.keep,
            dist_ckpt_optim_fully_reshardable=True,  # so that it resumes at any tp, pp and world size
            save_tokenizer_assets=False,
        ),
        dist=bridge.DistributedInitConfig(distributed_backend=runtime.backend()),
        rerun_state_machine=bridge.RerunStateMachineConfig(check_for_nan_in_loss=False),
        mixed_precision="bf16_mixed" if bf16 else None,
    )


def dataset(settings: Settings) -> Any:
    """The data of the training loop."""
    from mbridge_prune.distill.data import IndexedData, weighed

    data = settings.data
    return IndexedData(
        train=weighed(data.train),
        valid=weighed(data.valid) if settings.validate.steps else None,
        valid_samples=settings.validate.steps * settings.train.global_batch_size,
        seq_length=data.seq_length,
        seed=data.seed,
        cache=data.cache or str(settings.run_folder() / "data_cache"),
        dataloader_type="single",
        num_workers=data.num_workers,
        pin_memory=runtime.device().type == "cuda",
        persistent_workers=data.num_workers > 0,
    )


def train(settings: Settings, student: Any, vocab_size: int, begin: int) -> nn.Module:
    """Runs Bridge's training loop to the last step; returns this rank's part of the trained student.

    Raises:
        UserError: NaN, a checkpoint that cannot be written, a disk that is full.
        Stopped: SIGTERM came; a checkpoint was saved.
    """
    import_bridge(TRAINING)
    from megatron.bridge.training.initialize import destroy_global_state
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    from mbridge_prune.distill.progress import Progress
    from mbridge_prune.distill.step import ForwardStep
    from mbridge_prune.distill.stopping import StopsOnSignal

    config = configure(settings, student.provider, vocab_size, begin)
    progress = Progress(
        settings.run_folder(),
        steps=settings.steps(),
        tokens_a_step=settings.tokens_a_step(),
        log_interval=settings.output.log_interval,
        save_interval=settings.output.save_interval,
        begin=begin,
    )
    destroy_rerun_state_machine()  # where this process has written a checkpoint before, it left one
    stops = StopsOnSignal(settings.output.stop_file)
    try:
        with quiet(), megatron_speaks_to(settings.run_folder()), runtime.training(), helpers_compiled():
            warnings.filterwarnings("ignore", message="Function 'pretrain' is experimental")
            pretrain(config, ForwardStep(settings.loss.lm_weight), callbacks=[progress, stops])
    except SystemExit as end:
        if end.code == 0:  # the loop's way out; elsewhere, Bridge ends the process with another code
            progress.flush()  # the checkpoint covers them
            raise Stopped("told to stop") from end
        raise UserError(f"Megatron ended the run: see {settings.run_folder()}/megatron.log") from end
    except (OSError, CheckpointException) as error:
        free = shutil.disk_usage(settings.run_folder()).free  # torch does not always say that a disk is full
        drop_half_written(settings.checkpoints())
        saved = any(written_to_the_end(place) for place in settings.checkpoints().glob("iter_*"))
        again = "goes on from the last checkpoint" if saved else "begins anew: no checkpoint was written yet"
        raise UserError(
            f"the run cannot go on: {one_line(error)} ({free / 2**20:,.0f} MiB free in "
            f"{settings.run_folder()}); the same command {again}"
        ) from error
    finally:
        stops.release()
        destroy_global_state()  # after an error, the next run of this process would find it
    assert student.module is not None
    return student.module


def one_line(error: BaseException) -> str:
    """The first cause of an error, in one line; distributed checkpoints wrap each rank's."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def megatron_speaks_to(folder: Path) -> Iterator[None]:
    """What Megatron prints and logs goes to megatron.log (rank 0) or nowhere; our own log stays readable."""
    logger = logging.getLogger("megatron")
    with contextlib.ExitStack() as stack:
        out: TextIO = io.StringIO()
        if runtime.rank() == 0:
            out = stack.enter_context(open(folder / "megatron.log", "a", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(out))
        handler = logging.StreamHandler(out)
        before, logger.propagate = logger.propagate, False
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = before
