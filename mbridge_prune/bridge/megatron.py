"""Megatron torch_dist checkpoints, in and out: written and read at any layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from mbridge_prune import mcore, runtime
from mbridge_prune.bridge.checkpoint import (
    HF_CONFIG,
    check_shards,
    hf_config_of,
    iteration_folder,
    put_hf_config,
    shapes_in,
)
from mbridge_prune.bridge.export import refuse_full_folder
from mbridge_prune.bridge.exported import put_in_place, refuse_foreign, write_record
from mbridge_prune.bridge.load import LoadedModel, load_tokenizer, open_bridge, ready, start_layout
from mbridge_prune.bridge.quiet import quiet
from mbridge_prune.bridge.training_loop import import_bridge
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
        hf_folder: the exported Hugging Face folder; its config, tokenizer and code go to `hf_config/` beside
            the iteration, so that whatever comes next is built from the checkpoint's folder alone.
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
    import_bridge()
    if hf_folder is not None:
        unwrapped.config.hf_model_id = str(path.resolve() / HF_CONFIG)
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
        _make_portable(aside, path)
        if hf_folder is not None:
            put_hf_config(hf_folder, aside)
        if record is not None:
            write_record(aside, record)
        put_in_place(aside, path)
    runtime.barrier()
    return path


def load_mbridge_model_from_megatron(
    *,
    megatron_path: str | Path,
    hf_model_name_or_path: str | None = None,
    provider_overrides: Mapping[str, Any] | None = None,
    moe_grouped_gemm: bool = True,
    trust_remote_code: bool = False,
    init_model_parallel: bool = True,
) -> LoadedModel:
    """As `load_mbridge_model_from_hf`, with the weights of a Megatron `torch_dist` checkpoint.

    The model is built from its Hugging Face config, so it is the same as from the Hugging Face folder; the
    checkpoint may have been written at any layout, by Bridge, Megatron-LM or `save_megatron`. Optimizer
    states in it are not read.

    Args:
        megatron_path: a folder `iter_0001000`, or the one that holds such folders (the latest counts).
        hf_model_name_or_path: the Hugging Face config and tokenizer, where they do not lie beside.

    Raises:
        UserError: no checkpoint or no config, a missing shard, weights of another architecture or other
            sizes, and what `load_mbridge_model_from_hf` refuses.
    """
    iteration = iteration_folder(megatron_path)
    hf_path = hf_config_of(megatron_path, hf_model_name_or_path)
    check_shards(iteration)
    bridge, provider = open_bridge(
        hf_path, provider_overrides, moe_grouped_gemm, trust_remote_code, weights=False
    )
    # An export asks its source for `config`, and for tensors only where it has any.
    bridge.hf_pretrained = SimpleNamespace(config=bridge.hf_pretrained)
    start_layout(bridge, provider, init_model_parallel)
    provider.perform_initialization = False
    provider.register_pre_wrap_hook(lambda chunks: read_weights(chunks, iteration, hf_path))
    with quiet():
        model = provider.provide_distributed_model(wrap_with_ddp=False)
    unwrapped = ready(model, iteration)
    return LoadedModel(bridge, provider, model, unwrapped, load_tokenizer(hf_path, trust_remote_code))


def read_weights(chunks: list[nn.Module], iteration: Path, described_by: str = "") -> list[nn.Module]:
    """Fills a rank's Megatron model from a checkpoint of any layout; every rank takes part.

    Args:
        chunks: one, not wrapped.
        described_by: where the sizes of the model are from, for the message.

    Raises:
        UserError: the checkpoint is of another architecture or of other sizes, or cannot be read.
    """
    from megatron.core import dist_checkpointing as dist

    [model] = chunks
    try:
        kinds = dist.load_content_metadata(str(iteration))
        sharded = {
            name: part
            for name, part in model.sharded_state_dict(metadata=kinds).items()
            if "_extra_state" not in name  # of Transformer Engine, for FP8
        }
        refuse_other_shapes(sharded, iteration, described_by, getattr(model.config, "vocab_size", 0))
        state = dist.load({"model": sharded}, str(iteration))["model"]
    except (CheckpointingException, CheckpointException, OSError, RuntimeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the Megatron checkpoint {iteration}: {first}") from error
    left = model.load_state_dict(state, strict=False)
    unread = [name for name in left.missing_keys if "_extra_state" not in name]
    if unread or left.unexpected_keys:
        raise UserError(
            f"{iteration} does not fill the model: {', '.join([*unread, *left.unexpected_keys][:3])}"
        )
    return chunks


def refuse_other_shapes(
    sharded: Mapping[str, Any], iteration: Path, described_by: str, vocab_size: int
) -> None:
    """Refuses a checkpoint whose tensors are not those that the config describes, on every rank.

    Only the rows that pad the vocabulary (Megatron-LM's --make-vocab-size-divisible-by) may be more or fewer.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    built, found = dict(sharded), shapes_in(iteration)
    apply_factories(built)
    wrong = []
    for part in nested_values(built):
        if not isinstance(part, ShardedTensor):
            continue
        want, have = tuple(part.global_shape), found.get(part.key)
        padded = part.allow_shape_mismatch and have is not None and have[0] >= vocab_size
        if have is None or have[padded:] != want[padded:]:
            wrong.append(f"{part.key} is {have or 'not there'}, expected {want}")
    first = next((lines for lines in runtime.gather_objects(wrong[:3]) if lines), None)
    if first:
        raise UserError(
            f"{iteration} is not the model that {described_by or 'its config'} describes: {'; '.join(first)}"
        )


def _make_portable(aside: Path, path: Path) -> None:
    """The checkpoint shards freely, so its config names no layout: a reader brings its own.

    Args:
        aside: where it was written; `path` is its final name, which its config has the tokenizer under.
    """
    for file in aside.glob("iter_*/run_config.yaml"):
        config = yaml.safe_load(file.read_text())
        config["model"].update(
            pipeline_model_parallel_layout=None,
            pipeline_model_parallel_size=1,
            tensor_model_parallel_size=1,
            expert_model_parallel_size=1,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        )
        if isinstance(config.get("tokenizer"), dict):
            config["tokenizer"]["tokenizer_model"] = str(path.resolve() / HF_CONFIG)
        file.write_text(yaml.safe_dump(config, sort_keys=True))
