"""What an exported folder is of, written inside it, so that it is exported anew when the plan is another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.errors import UserError

RECORD = "mbridge_prune.json"


def record_of(
    source: str | None, scores: Path, sizes: Mapping[str, int], layers: Sequence[int], repair: str = "none"
) -> dict[str, Any]:
    """What decides the weights of an export.

    Args:
        source: the model that was cut.
        scores: its scores file, which decides what is kept; it need not exist.
    """
    digest = hashlib.sha256(scores.read_bytes()).hexdigest() if scores.is_file() else None
    return {
        "source": source,
        "scores": digest,
        "sizes": dict(sizes),
        "layers": list(layers),
        "repair": repair,
    }


def holds(folder: Path, record: Mapping[str, Any]) -> bool:
    """True where the folder is the export of just this; the same on every rank."""
    return runtime.gather_objects(runtime.rank() == 0 and _read(folder) == record)[0]


def refuse_foreign(folder: Path) -> None:
    """Refuses a folder that holds anything but an export of ours.

    Raises:
        UserError: it was not written by a run, or cannot be told to be.
    """
    full = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if full and _read(folder) is None:
        raise UserError(f"output folder {folder} is not empty; give another one or remove it")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def put_in_place(aside: Path, path: Path) -> None:
    """Renames a complete export to its final name; a former one goes only then."""
    former = path.with_name(f".{path.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():
        os.replace(path, former)
    try:
        os.replace(aside, path)
    except OSError:
        if former.exists():
            os.replace(former, path)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _read(folder: Path) -> Any:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None
