"""A Megatron torch_dist checkpoint of the pruned model, loadable by Megatron-Bridge at any layout."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mbridge_prune import mcore, runtime
from mbridge_prune.bridge.export import refuse_full_folder
from mbridge_prune.bridge.exported import put_in_place, refuse_foreign, write_record
from mbridge_prune.bridge.quiet import quiet
from mbridge_prune.errors import UserError


def save_megatron(
    bridge: Any,
    model: list[nn.Module],
    path: str | Path,
    *,
    hf_folder: str | Path | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the checkpoint (iteration 0, weights only, with run_config.yaml); every rank takes part.

    Args:
        hf_folder: the exported Hugging Face folder; its config and tokenizer are what the
            checkpoint's `run_config.yaml` refers to.
        record: as in `export_hf`.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    path = Path(path)
    (refuse_full_folder if record is None else refuse_foreign)(path)
    unwrapped = model[0].module if hasattr(model[0], "module") else model[0]
    problem = mcore.reload_problem(mcore.language_model(unwrapped))
    if any(runtime.gather_objects(problem)):
        raise UserError(f"no Megatron checkpoint is written to {path}: {problem or 'see the other ranks'}")
    aside = path.with_name(f".{path.name}.partial")
    if runtime.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
    runtime.barrier()
    _import_bridge_checkpointing()
    config = unwrapped.config
    if hf_folder is not None:
        config.hf_model_id = str(Path(hf_folder).resolve())
    has_tokenizer = hf_folder is not None and (Path(hf_folder) / "tokenizer_config.json").is_file()
    try:
        with quiet():
            tokenizer = str(hf_folder) if has_tokenizer else None
            bridge.save_megatron_model(model, aside, hf_tokenizer_path=tokenizer)
    except (OSError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot write the Megatron checkpoint {path}: {error}") from error
    runtime.barrier()
    if runtime.rank() == 0:
        _forget_layout(aside)
        if record is not None:
            write_record(aside, record)
        put_in_place(aside, path)
    runtime.barrier()
    return path


def load_megatron(bridge: Any, path: str | Path) -> list[nn.Module]:
    """The Megatron model in a checkpoint, at the layout of the running process groups."""
    _import_bridge_checkpointing()
    from mbridge_prune.bridge.corrections.dense import correct_gemma_layers

    layout = {
        "pipeline_model_parallel_size": runtime.size("pp"),
        "tensor_model_parallel_size": runtime.size("tp"),
        "expert_model_parallel_size": runtime.size("ep"),
        "expert_tensor_parallel_size": 1,
    }
    with quiet():
        model = bridge.load_megatron_model(path, mp_overrides=layout, wrap_with_ddp=False)
    return correct_gemma_layers(model)


def _forget_layout(path: Path) -> None:
    """The checkpoint shards freely, so its config names no layout: a reader brings its own."""
    for file in path.glob("iter_*/run_config.yaml"):
        config = yaml.safe_load(file.read_text())
        config["model"].update(
            pipeline_model_parallel_layout=None,
            pipeline_model_parallel_size=1,
            tensor_model_parallel_size=1,
            expert_model_parallel_size=1,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        )
        file.write_text(yaml.safe_dump(config, sort_keys=True))


def _import_bridge_checkpointing() -> None:
    """Imports Bridge's checkpoint code, which names hooks of a package it does not need here.

    `megatron.bridge.training.checkpointing` imports four functions of nvidia-modelopt at its top,
    for the state of quantised models; ours have none. Where that package is missing, empty hooks
    stand in for the length of the import and are gone after it.
    """
    modules = (
        "megatron.bridge.training.checkpointing",
        "megatron.bridge.training.post_training.checkpointing",
        "megatron.bridge.training.model_load_save",
    )
    if importlib.util.find_spec("modelopt") is not None:
        return
    names = ("modelopt", "modelopt.torch", "modelopt.torch.opt", "modelopt.torch.opt.plugins")
    hooks = {name: types.ModuleType(name) for name in names}
    for function in (
        "restore_modelopt_state",
        "restore_sharded_modelopt_state",
        "save_modelopt_state",
        "save_sharded_modelopt_state",
    ):
        setattr(hooks[names[-1]], function, lambda *args, **kwargs: None)
    sys.modules.update(hooks)
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        for name in names:
            del sys.modules[name]
