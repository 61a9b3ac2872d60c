"""Which checkpoint a run goes on from: the newest that is whole, whatever ended the run before."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import yaml

from mbridge_prune import runtime
from mbridge_prune.bridge.checkpoint import HF_CONFIG, put_hf_config
from mbridge_prune.errors import UserError
from mbridge_prune.files import replaced

log = logging.getLogger("mbridge_prune")
LAST_WRITTEN = "run_config.yaml"
"""Megatron-Bridge writes it last: a folder without it was being written when its run ended."""
READ_AGAIN = (
    ("model", "tensor_model_parallel_size"),
    ("model", "pipeline_model_parallel_size"),
    ("checkpoint", "save_optim"),
    ("train", "global_batch_size"),
)
NEEDED = ("common.pt", "metadata.json", ".metadata", "train_state.pt")
TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")


def settle(folder: Path) -> int:
    """Makes a folder of checkpoints say its newest whole one, and returns its step (0: there is none).

    What a killed run left half-written is removed. A checkpoint that was whole and lacks a file now is set
    aside under another name, with a warning. Every rank gets rank 0's answer.

    Raises:
        UserError: there were whole checkpoints, and none is whole now.
    """
    answer = runtime.gather_objects(_settle(folder) if runtime.rank() == 0 else None)[0]
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


def _settle(folder: Path) -> int | str:
    damaged: list[str] = []
    for place in sorted(folder.glob("iter_*"), reverse=True):
        if not written_to_the_end(place):
            shutil.rmtree(place)
            log.info("removed the half-written checkpoint %s", place)
            continue
        problem = missing_part(place)
        if problem is None:
            _point_to(folder, place)
            return int(place.name.removeprefix("iter_"))
        damaged.append(f"{place.name}: {problem}")
        aside = place.with_name(f"damaged_{place.name}")
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        log.warning("checkpoint %s is damaged (%s) and set aside as %s", place.name, problem, aside.name)
    for name in TRACKERS:
        (folder / name).unlink(missing_ok=True)
    if damaged:
        return (
            f"no checkpoint in {folder} is whole ({damaged[0]}): bring the missing file back and rename "
            "the folder as it was, or begin anew with another --output"
        )
    return 0


def written_to_the_end(place: Path) -> bool:
    """Whether the file that is written last is there with what a resumed run reads of it."""
    try:
        config = yaml.safe_load((place / LAST_WRITTEN).read_text())
        return isinstance(config, dict) and all(name in config[part] for part, name in READ_AGAIN)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False


def missing_part(place: Path) -> str | None:
    """What a torch_dist checkpoint lacks: a file, or the end of one; None where it is whole."""
    from torch.distributed.checkpoint import FileSystemReader

    for name in NEEDED:
        if not (place / name).is_file():
            return f"{name} is missing"
    try:
        stored = FileSystemReader(str(place)).read_metadata().storage_data or {}
    except Exception as error:  # a pickle that was cut short fails in many ways
        return f".metadata cannot be read: {type(error).__name__}"
    for part in stored.values():
        file = place / part.relative_path
        if not file.is_file():
            return f"{part.relative_path} is missing"
        if file.stat().st_size < part.offset + part.length:
            return f"{part.relative_path} is cut short"
    return None


def _point_to(folder: Path, place: Path) -> None:
    """Writes the trackers anew: a run that was killed may have left them behind, or half-written."""
    step = str(int(place.name.removeprefix("iter_")))
    for name, content in zip(TRACKERS, ((place / "train_state.pt").read_bytes(), step.encode()), strict=True):
        with replaced(folder / name) as aside:
            aside.write_bytes(content)


def describe(folder: Path, student: str) -> None:
    """Puts the student's config and tokenizer beside the checkpoints, which are complete with them.

    Of a hub name, Megatron-Bridge notes the name in every checkpoint.
    """
    beside = folder / HF_CONFIG
    if runtime.rank() == 0 and Path(student).is_dir() and Path(student).resolve() != beside.resolve():
        put_hf_config(student, folder)


def drop_half_written(folder: Path) -> None:
    """After a failed save: gives the disk its space back."""
    if runtime.rank() == 0:
        for place in folder.glob("iter_*"):
            if not written_to_the_end(place):
                shutil.rmtree(place, ignore_errors=True)
