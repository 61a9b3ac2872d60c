"""Hugging Face out: config, streamed safetensors shards, tokenizer, generation config; then verified."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from mbridge_prune import mcore, runtime
from mbridge_prune.bridge.exported import put_in_place, refuse_foreign, write_record
from mbridge_prune.bridge.hf_config import FIELDS, experts_only, pruned_hf_config, text_config
from mbridge_prune.bridge.quiet import quiet
from mbridge_prune.errors import UserError
from mbridge_prune.files import save_tensors
from mbridge_prune.report.console import progress_bar

log = logging.getLogger("mbridge_prune")
SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
EMBEDDING = "embedding.word_embeddings.weight"


def export_hf(
    bridge: Any,
    model: list[nn.Module],
    path: str | Path,
    *,
    layers_kept: Sequence[int],
    sizes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    source: str | Path | None = None,
    model_card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the pruned model as an ordinary Hugging Face folder; every rank takes part.

    Weights come tensor by tensor from their pipeline stage; rank 0 holds one shard at a time. All is
    written aside and renamed at the end.

    Args:
        record: what the export is of (`bridge/exported.py`), kept in the folder; one with another record
            is replaced when the new one is complete.

    Raises:
        UserError: the folder exists and is not empty, the disk is full, or what was written does
            not describe one consistent model (`verify_hf`); nothing is left under the final name.
    """
    path = Path(path)
    (refuse_full_folder if record is None else refuse_foreign)(path)
    runtime.barrier()  # a slow data-parallel rank must not look once rank 0 has written
    unwrapped = model[0].module if hasattr(model[0], "module") else model[0]
    config = pruned_hf_config(bridge.hf_pretrained.config, unwrapped.config, layers_kept)
    aside = path.with_name(f".{path.name}.partial")
    failure: str | None = None
    writer = None
    if runtime.rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        writer = _ShardWriter(aside, shard_bytes)
        failure = _attempt(lambda: aside.mkdir(parents=True))
    with quiet(), described_by(bridge, config):
        tasks = conversion_tasks(bridge, model, config)
    parts = [task.mapping.hf_param for task in tasks if task is not None]
    total = sum(len(part) if isinstance(part, dict) else 1 for part in parts)
    with quiet(), described_by(bridge, config), progress_bar("export", total, "tensors") as step:
        weights = bridge.export_hf_weights(model, cpu=True, show_progress=False, conversion_tasks=tasks)
        for name, tensor in weights:
            # Every rank must go on to the end, or the others would wait for it for ever.
            if writer is not None and failure is None:
                failure = _attempt(lambda n=name, t=tensor: writer.add(n, t))
            step(1)
    if writer is not None and failure is None:
        failure = _attempt(lambda: _finish(writer, aside, config, tokenizer, source, model_card))
    if writer is not None and failure is None and record is not None:
        failure = _attempt(lambda: write_record(aside, record))
    if writer is not None and failure is None:
        failure = _attempt(lambda: _check_and_rename(aside, path, sizes, trust_remote_code))
    failure = runtime.gather_objects(failure)[0]
    if failure is not None:
        if runtime.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"cannot write the model to {path}: {failure}; nothing was left there")
    runtime.barrier()
    return path


def verify_hf(
    path: str | Path, sizes: Mapping[str, int] | None = None, trust_remote_code: bool = False
) -> int:
    """Checks that a folder's config and tensors describe one model that loads strictly.

    The model is built on the meta device from config.json; every tensor it names must be in the
    files with exactly that shape, and none may be left over.

    Args:
        sizes: hparam -> planned size; the config must say the same.

    Returns:
        Parameters in the folder (a tied output layer counts once).

    Raises:
        RuntimeError: naming the first tensors that disagree.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        expected = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    tied = set(expected._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    want = {n: tuple(t.shape) for n, t in expected.state_dict().items()}
    have = {_renamed(expected, n): shape for n, shape in _shapes(Path(path)).items()}
    wrong = [n for n, shape in want.items() if n not in tied and have.get(n) != shape]
    heads = _prediction_heads(text_config(config))
    extra = [n for n in have if n not in want and not n.endswith("inv_freq") and not n.startswith(heads)]
    if wrong or extra:
        lines = [f"{n}: config says {want[n]}, file has {have.get(n)}" for n in wrong[:3]]
        lines += [f"{n}: not in the architecture" for n in extra[:3]]
        raise RuntimeError(f"the exported model in {path} is inconsistent: " + "; ".join(lines))
    text = text_config(config)
    for hparam, size in (sizes or {}).items():
        names = () if hparam == "ffn_hidden_size" and experts_only(text) else FIELDS.get(hparam, ())
        says = [getattr(text, n) for n in names if getattr(text, n, None) is not None]
        if says and says[0] != size:
            raise RuntimeError(f"{path}/config.json says {hparam}={says[0]}, the plan {size}")
    buffers = {n for n, _ in expected.named_buffers()}
    return sum(math.prod(shape) for n, shape in have.items() if n not in tied and n not in buffers)


def auto_class(config: Any) -> Any:
    """The transformers class that builds a model with its head: text alone, or with images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def _renamed(model: Any, name: str) -> str:
    """A checkpoint's name as the model knows it: some architectures were renamed since."""
    for pattern, new in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items():
        renamed, n = re.subn(pattern, new, name)
        if n:
            return renamed
    return name


def _prediction_heads(text: Any) -> tuple[str, ...]:
    """Names of multi-token-prediction layers: transformers ignores them, other engines read them."""
    first, count = text.num_hidden_layers, getattr(text, "num_nextn_predict_layers", None) or 0
    return tuple(f"model.layers.{first + i}." for i in range(count))


@contextlib.contextmanager
def described_by(bridge: Any, config: Any) -> Iterator[None]:
    """Inside, Megatron-Bridge's conversion reads the pruned model's config (its counts and names)."""
    source = bridge.hf_pretrained
    before = source.config
    source.config = config
    try:
        yield
    finally:
        source.config = before


def conversion_tasks(bridge: Any, model: list[nn.Module], config: Any) -> list[Any]:
    """Megatron-Bridge's tasks for every weight of the pruned model.

    Bridge leaves out what the unpruned checkpoint has no name for; but where kinds of layers
    alternate, a layer that moved up has names its new place did not have.
    """
    from megatron.core.utils import unwrap_model

    source = SimpleNamespace(get_all_keys=_EveryName)
    pruned = SimpleNamespace(config=config, state=SimpleNamespace(source=source))
    tasks = bridge._model_bridge.build_conversion_tasks(pruned, model)
    if mcore.language_model(unwrap_model(model)[0]).pre_process:
        return tasks
    return [_of_the_first_stage(task) if _is_embedding(task) else task for task in tasks]


def _is_embedding(task: Any) -> bool:
    return task is not None and task.param_name.endswith(EMBEDDING)


def _of_the_first_stage(task: Any) -> Any:
    """A later stage has a copy of the embedding for its multi-token-prediction heads: not exported."""
    return dataclasses.replace(task, megatron_module=None, param_weight=None)


class _EveryName:
    """A set of names that holds each."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())


def refuse_full_folder(path: Path) -> None:
    """Nothing that exists is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"output folder {path} is not empty; give another one or remove it")


class _ShardWriter:
    """Collects tensors into shards of bounded size; names them when their number is known."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.limit = folder, shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.bytes = self.total = 0
        self.shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self.bytes + tensor.nbytes > self.limit:
            self.flush()
        self.pending[name] = tensor.detach().clone().contiguous()
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def flush(self) -> None:
        if self.pending:
            file = self.folder / f"shard-{len(self.shards)}"
            save_tensors(self.pending, file, {"format": "pt"})
            self.shards.append((file, list(self.pending)))
            self.pending, self.bytes = {}, 0

    def close(self) -> None:
        self.flush()
        if len(self.shards) == 1:
            self.shards[0][0].rename(self.folder / "model.safetensors")
            return
        where = {}
        for number, (file, names) in enumerate(self.shards, start=1):
            final = f"model-{number:05d}-of-{len(self.shards):05d}.safetensors"
            file.rename(self.folder / final)
            where.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total}, "weight_map": where}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _finish(
    writer: _ShardWriter, folder: Path, config: Any, tokenizer: Any, source: Any, card: str | None
) -> None:
    writer.close()
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    generation = Path(source) / "generation_config.json" if source is not None else None
    if generation is not None and generation.is_file():
        shutil.copyfile(generation, folder / "generation_config.json")
    elif source is not None and not Path(source).exists():
        _generation_config_of_hub(str(source), folder)
    if source is not None and Path(source).is_dir():
        for code in Path(source).glob("*.py"):
            shutil.copyfile(code, folder / code.name)
    if card is not None:
        (folder / "README.md").write_text(card)


def _generation_config_of_hub(name: str, folder: Path) -> None:
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_pretrained(name).save_pretrained(folder)
    except (OSError, ValueError) as error:
        log.info("no generation config taken from %s: %s", name, str(error).splitlines()[0])


def _check_and_rename(aside: Path, path: Path, sizes: Mapping[str, int] | None, trust: bool) -> None:
    verify_hf(aside, sizes, trust)
    put_in_place(aside, path)


def _attempt(action: Any) -> str | None:
    """None, or what went wrong in one line (rank 0 alone writes; the others must be told)."""
    try:
        action()
    except Exception as error:  # whatever it is, the other ranks wait to be told
        return str(error) or type(error).__name__
    return None


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as handle:
            for name in handle.keys():
                shapes[name] = tuple(handle.get_slice(name).get_shape())
    return shapes
