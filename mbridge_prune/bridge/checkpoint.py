"""What lies in a Megatron checkpoint's folder: iterations, shards, the Hugging Face config beside."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

from mbridge_prune.errors import UserError

HF_CONFIG = "hf_config"
"""Folder beside the iterations: config, tokenizer and code of the Hugging Face model, without its weights."""

TRACKER = "latest_checkpointed_iteration.txt"
INSIDE_RUNS = ("checkpoints", "megatron")
"""Where the run folders of launch/distill.py and (by habit) launch/prune.py have theirs."""

FORMATS = ("torch_dist",)
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
NOT_OF_THE_MODEL = ("README.md", "mbridge_prune.json")


def iteration_folder(path: str | Path) -> Path:
    """The folder of the iteration that a checkpoint folder stands for.

    Args:
        path: a folder `iter_0001000`, the one that holds such folders, or the run folder around that. Of
            several, the one that the tracker file names counts: a later one may be half-written.

    Raises:
        UserError: there is no such folder, no complete iteration in it, or one of a format that is not read.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"no such Megatron checkpoint folder: {path}")
    root = next((root / name for name in INSIDE_RUNS if _holds_iterations(root / name)), root)
    if (root / "metadata.json").is_file():
        return _readable(root)
    tracker = root / TRACKER
    if tracker.is_file():
        said = tracker.read_text().strip()
        folder = root / (f"iter_{int(said):07d}" if said.isdigit() else said or "nothing")
        if not (folder / "metadata.json").is_file():
            raise UserError(f"{tracker} names {folder.name}, and {folder} is no complete checkpoint")
        return _readable(folder)
    found = [
        f for f in root.glob("iter_*") if iteration_number(f) is not None and (f / "metadata.json").is_file()
    ]
    if not found:
        raise UserError(
            f"{path} is no Megatron checkpoint: it has no {TRACKER}, no iter_* folder and no metadata.json"
        )
    return _readable(max(found, key=lambda f: iteration_number(f) or 0))


def _holds_iterations(folder: Path) -> bool:
    return (folder / TRACKER).is_file() or any(folder.glob("iter_*"))


def _readable(iteration: Path) -> Path:
    from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config

    try:
        config = maybe_load_config(str(iteration))
    except (CheckpointingException, ValueError, TypeError) as error:
        raise UserError(f"cannot read {iteration}/metadata.json: {error}") from error
    kind = getattr(config, "sharded_backend", None)
    if kind not in FORMATS:
        raise UserError(
            f"{iteration} is a checkpoint of format {kind}; save it as {FORMATS[0]} first "
            "(Megatron's --ckpt-format, Bridge's checkpoint.ckpt_format)"
        )
    return iteration


def iteration_number(iteration: Path) -> int | None:
    """The training step in a folder's name, where it has one."""
    match = re.fullmatch(r"iter_(\d+)", iteration.name)
    return int(match[1]) if match else None


def hf_config_of(path: str | Path, hf_path: str | None = None, flag: str = "--hf-path") -> str:
    """The folder (or hub name) of the Hugging Face config that describes a Megatron checkpoint.

    In this order: `hf_path` as given; `hf_config/` or a config.json beside the iterations; what Bridge's
    run_config.yaml names.

    Args:
        flag: what gives `hf_path` on the command line, for the message.

    Raises:
        UserError: none of them is there.
    """
    if hf_path:
        return hf_path
    iteration = iteration_folder(path)
    for root in dict.fromkeys((iteration, Path(path), iteration.parent)):
        for folder in (root / HF_CONFIG, root):
            if (folder / "config.json").is_file():
                return str(folder)
    named = _named_by_bridge(iteration)
    if named and ((Path(named) / "config.json").is_file() or not Path(named).is_absolute()):
        return named
    gone = f", and {named}, which its run_config.yaml names, is gone" if named else ""
    raise UserError(
        f"no Hugging Face config beside the Megatron checkpoint {path} ({HF_CONFIG}/config.json){gone}: "
        f"give the model's folder or hub name with {flag}"
    )


def _named_by_bridge(iteration: Path) -> str | None:
    import yaml

    file = iteration / "run_config.yaml"
    try:
        content = yaml.safe_load(file.read_text()) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    model = content.get("model") if isinstance(content, dict) else None
    return model.get("hf_model_id") if isinstance(model, dict) else None


def put_hf_config(hf_path: str | Path, checkpoint: Path) -> None:
    """Copies config, tokenizer, generation config and code (no weights) to a checkpoint's `hf_config/`.

    Args:
        hf_path: a Hugging Face folder.
    """
    target = checkpoint / HF_CONFIG
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(hf_path).iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in NOT_OF_THE_MODEL:
            shutil.copyfile(file, target / file.name)


def check_shards(iteration: Path) -> None:
    """Refuses a checkpoint that lacks one of its files, or the end of one, before any weight is read.

    Raises:
        UserError: naming the files.
    """
    needed: dict[str, int] = {}
    for place in shard_index(iteration).storage_data.values():
        end = (place.offset or 0) + (place.length or 0)
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
    missing = [name for name in sorted(needed) if not (iteration / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{iteration} lacks {', '.join(missing[:3])}{more} of its {len(needed)} shards")
    short = [name for name, size in sorted(needed.items()) if (iteration / name).stat().st_size < size]
    if short:
        has = (iteration / short[0]).stat().st_size
        raise UserError(f"{iteration}/{short[0]} is cut short: {has:,} bytes of {needed[short[0]]:,}")


def shard_index(iteration: Path) -> Any:
    """torch's index of a distributed checkpoint: every tensor's shape, and where its parts lie.

    Raises:
        UserError: it is missing or broken.
    """
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(iteration).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"cannot read the index of {iteration}: {error}") from error


def shapes_in(iteration: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> global shape, of everything in a checkpoint."""
    index = shard_index(iteration).state_dict_metadata
    return {name: tuple(entry.size) for name, entry in index.items() if hasattr(entry, "size")}


def dtype_in(iteration: Path) -> Any:
    """The dtype that the weights of a checkpoint are stored in (of its first layer's)."""
    index = shard_index(iteration).state_dict_metadata
    for name, entry in sorted(index.items()):
        if name.startswith("decoder.layers.") and hasattr(entry, "properties"):
            return entry.properties.dtype
    raise UserError(f"{iteration} holds no decoder.layers.* weights: it is no language model's checkpoint")
