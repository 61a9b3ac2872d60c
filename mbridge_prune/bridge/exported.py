"""What an exported folder is of, written inside it, so that it is exported anew when the plan is another."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
RECORD = "mbridge_prune.json"
FILES = "files"
"""The key of the record under which it names the files that were written with it."""


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
    found = _read(folder) if runtime.rank() == 0 else {}
    return runtime.gather_objects({k: v for k, v in found.items() if k != FILES} == record)[0]


def is_ours(folder: Path) -> bool:
    """True where the folder is an export, and holds what was written and nothing else."""
    written = _read(folder).get(FILES)
    return written is not None and written == _files(folder)


def refuse_foreign(folder: Path) -> None:
    """Refuses a folder that holds anything but an export of ours as it was written.

    Raises:
        UserError: it was not written by a run, cannot be told to be, or was changed since.
    """
    full = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if full and not is_ours(folder):
        changed = " and holds files of later than its export" if _read(folder) else ""
        raise UserError(f"output folder {folder} is not empty{changed}; give another one or remove it")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Comes last: it names every file that stands there."""
    content = json.dumps({**record, FILES: _files(folder)}, indent=1)
    (folder / RECORD).write_text(content + "\n")


def remove_stale(parent: Path, keep: int) -> None:
    """Removes the numbered exports in `parent` beyond the first `keep`, which are of an earlier search.

    Only what `is_ours` goes; of anything else the log says that it stays. Rank 0 does it.
    """
    if runtime.rank() != 0 or not parent.is_dir():
        return
    for folder in sorted(parent.iterdir()):
        if not re.fullmatch(r"\d\d+", folder.name) or int(folder.name) <= keep:
            continue
        if folder.is_symlink() or not is_ours(folder):
            log.warning("%s is of an earlier search, and stays: it holds more than its export", folder)
            continue
        former = folder.with_name(f".{folder.name}.former")
        os.replace(folder, former)  # nothing half-removed keeps its name
        shutil.rmtree(former)
        log.info("removed %s: an export of an earlier search, or one more than --export-top-k", folder)
    if not any(parent.iterdir()):
        parent.rmdir()


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


def _read(folder: Path) -> dict[str, Any]:
    """The record of an export; empty where there is none."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _files(folder: Path) -> dict[str, list[int]]:
    """Name -> size and second of the last change, of every file but the record itself."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir() and path != folder / RECORD)
    stats = {str(path.relative_to(folder)): path.lstat() for path in files}
    return {name: [stat.st_size, int(stat.st_mtime)] for name, stat in stats.items()}
