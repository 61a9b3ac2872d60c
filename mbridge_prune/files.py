"""Files as other people of a cluster find them: whole, and readable as their umask says."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mbridge_prune import runtime
from mbridge_prune.errors import UserError


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """A safetensors file that has the mode of any new file; safetensors gives it to its owner alone."""
    save_file(dict(tensors), path, dict(metadata))
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def write_tensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str], what: str
) -> None:
    """Rank 0 writes a safetensors file aside and renames it; every rank returns when it is there.

    Args:
        what: the file in words, for the message.

    Raises:
        UserError: the file cannot be written; one that was there stays as it was.
    """
    if runtime.rank() == 0:
        with replaced(path, f"{what} {path}", str(os.getpid())) as aside:  # several runs may share it
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)
    runtime.barrier()


def write_json(path: Path, content: Any) -> None:
    """Rank 0 writes aside and renames.

    Raises:
        UserError: the file cannot be written; one that was there stays as it was.
    """
    if runtime.rank() == 0:
        with replaced(path) as aside:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def replaced(path: Path, what: str | None = None, suffix: str = "partial") -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when it is whole, and is gone when it is not.

    Args:
        what: the file in words, for the message (default: its path).

    Raises:
        UserError: it cannot be written; a file that was there stays as it was.
    """
    aside = path.with_name(f".{path.name}.{suffix}")
    try:
        yield aside
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {what or path}: {error}") from error


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed, in words; empty if nothing did."""
    return "; ".join(
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


def free_name(path: Path) -> Path:
    """The path with a number before its ending, the first that is not taken."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return aside
