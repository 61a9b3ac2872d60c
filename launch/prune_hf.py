"""Prunes a transformers encoder or GPT-J to a budget with GradNAS: python launch/prune_hf.py --help."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_prune import cli, config, gradnas, prune, runtime
from mbridge_prune.bridge.load import check_hf_folder, load_tokenizer
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.score_functions import load_function
from mbridge_prune.heterogeneous import command
from mbridge_prune.huggingface.pretrained import FIELD, cut_to, needs_us
from mbridge_prune.huggingface.settings import Settings
from mbridge_prune.huggingface.tasks import Task, own_loss, task_of
from mbridge_prune.plan import Plan
from mbridge_prune.search.callables import Named

log = logging.getLogger("mbridge_prune")
HF, SCORES = "hf", "scores.safetensors"


def main(arguments: Sequence[str]) -> int:
    settings, known = config.from_command_line(arguments, Settings)
    path = settings.model.hf_path
    if not path:
        raise UserError("no model: give --hf-path FOLDER (or model.hf_path in the config)")
    budgets, space = settings.search.budgets(), dataclasses.asdict(settings.prune)
    check_hf_folder(path, weights=not known.dry_run)
    if known.dry_run:
        full = built(settings)
        gradnas.profile(full, budgets, space, dummy_input(full, settings))
        log.info("dry run: no weights were read, nothing was written")
        return 0
    if not (settings.data.path or settings.data.loader):
        raise UserError("no data: give --data FILE, or --data-loader module:function and --loss-func")

    def load() -> command.Job:
        tokenizer = load_tokenizer(path, settings.model.trust_remote_code)
        model = loaded(settings)
        given = dummy_input(model, settings)
        task = own_task(settings, model, tokenizer) or task_of(model, tokenizer, settings.data)

        def cut(model: nn.Module, checkpoint: Path) -> Plan:
            keys = {"data_loader": task.batches, "loss_func": task.loss, "collect_func": task.collect,
                    "checkpoint": checkpoint.with_name(SCORES)}  # fmt: skip
            return prune(model, [("gradnas", space)], budgets, given, keys)[1]

        return command.Job(model, cut, lambda model, folder: write_hf(model, tokenizer, folder))

    return command.run(settings, load)


def model_class(settings: Settings) -> tuple[Any, Any]:
    """(class of transformers, configuration) of the model."""
    import transformers

    path = settings.model.hf_path
    found = transformers.AutoConfig.from_pretrained(path, trust_remote_code=settings.model.trust_remote_code)
    name = (found.architectures or ["(none)"])[0]
    cls = getattr(transformers, name, None)
    if cls is None:
        raise UserError(f"{path} is a {name}, which transformers {transformers.__version__} does not have")
    return cls, found


def built(settings: Settings) -> nn.Module:
    """The model as its configuration says, with random weights; one that GradNAS has pruned before, too."""
    cls, found = model_class(settings)
    model, sizes = cls(found), getattr(found, FIELD, None)
    if sizes is not None:
        cut_to(model, sizes, f"{settings.model.hf_path}/config.json")
    return model


def loaded(settings: Settings) -> nn.Module:
    """The model with its weights; one that GradNAS has pruned before, too."""
    from mbridge_prune import from_pretrained

    dtype = settings.model.dtype
    wanted = runtime.default_dtype() if dtype == "auto" else getattr(torch, dtype)
    cls, _ = model_class(settings)
    return from_pretrained(settings.model.hf_path or "", cls, dtype=wanted).to(runtime.device()).eval()


def dummy_input(model: Any, settings: Settings) -> dict[str, torch.Tensor]:
    """One sequence, without padding."""
    length, limit = settings.data.seq_length, getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(f"--seq-length {length} is more than the {limit} positions of the model")
    token = 1 if model.config.pad_token_id != 1 else 0
    return {"input_ids": torch.full((1, length), token)}


def own_task(settings: Settings, model: nn.Module, tokenizer: Any) -> Task | None:
    """The task that the user's functions make; None where the model's own is wanted."""
    data = settings.data
    if data.loader is None:
        if data.loss or data.collect:
            raise UserError("--loss-func and --collect-func go with --data-loader")
        return None
    if data.path:
        raise UserError("give --data or --data-loader, not both")
    try:
        batches = named(data.loader)(model, tokenizer)
    except Exception as error:  # the user's own code
        raise UserError(f"{data.loader} failed: {type(error).__name__}: {error}") from error
    return Task(
        batches, named(data.loss) if data.loss else own_loss, named(data.collect) if data.collect else None
    )


def named(name: str) -> Named:
    """The function "module:function"."""
    if ":" not in name:
        raise UserError(f"{name!r} is no function: give module:function")
    function, source = load_function(name)
    return Named(name, source, function)


def write_hf(model: Any, tokenizer: Any, folder: Path) -> Mapping[str, str]:
    """Rank 0 writes model and tokenizer aside, then renames; what a killed run of ours left is replaced."""
    final, aside = folder / HF, folder / f".{HF}.partial"
    if runtime.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
    why = needs_us(model)
    how = f"load with mbridge_prune.from_pretrained: {why}" if why else "transformers loads it by itself"
    return {HF: f"the pruned model ({how})", SCORES: "importance scores"}


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
