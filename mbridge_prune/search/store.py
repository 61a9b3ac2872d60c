"""candidates.jsonl: what a search has measured, one line each, appended and never rewritten.

A killed search reads it and goes on; a search of anything else (another divisor, bound, filter, score
function, text or model) sets it aside and says what changed. docs/search.md lists the keys.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.files import changes, free_name

log = logging.getLogger("mbridge_prune")
Record = dict[str, Any]


class Store:
    """Records of one search, equal on every rank; rank 0 writes.

    Args:
        path: the file; None keeps records in memory alone.
        identity: what the search is of: a record is used again only under the same.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity, sort_keys=True, default=str))
        self.records: list[Record] = runtime.gather_objects(self._open() if runtime.rank() == 0 else [])[0]
        self._known = {_key(r): r for r in self.records}

    def find(self, kind: str, sizes: Mapping[str, int], samples: int | None = None) -> Record | None:
        """The record of a measurement that was made before, or None."""
        return self._known.get(_key({"kind": kind, "sizes": sizes, "samples": samples}))

    def add(self, record: Record) -> Record:
        """Appends a record (the same one on every rank) and returns it as it will be read back."""
        record = json.loads(json.dumps(record))
        self.records.append(record)
        self._known[_key(record)] = record
        if self.path is not None and runtime.rank() == 0:
            self._append(record)
        return record

    def of(self, kind: str) -> list[Record]:
        """All records of a kind, in their order."""
        return [record for record in self.records if record["kind"] == kind]

    def _open(self) -> list[Record]:
        if self.path is None or not self.path.exists():
            self._begin()
            return []
        records = _read(self.path)
        changed = _difference(records[0].get("identity") if records else None, self.identity)
        if not changed:
            measured = records[1:]
            if measured:
                log.info("search taken up again: %d measurements read from %s", len(measured), self.path)
            return measured
        aside = free_name(self.path)
        self.path.rename(aside)
        log.warning("a new search begins (%s); the former one is kept in %s", changed, aside)
        self._begin()
        return []

    def _begin(self) -> None:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error}") from error
            self._append({"kind": "identity", "identity": self.identity})

    def _append(self, record: Record) -> None:
        assert self.path is not None
        try:
            with self.path.open("ab") as file:
                if file.tell() and not _ends_in_newline(self.path):
                    file.write(b"\n")  # after a line that a killed run left broken
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from error


def _key(record: Mapping[str, Any]) -> str:
    """Divergences are the same measurement whatever they are made for."""
    kind = "kl" if record["kind"] in ("axis", "pair", "halving") else record["kind"]
    sizes = record.get("sizes")
    return json.dumps([kind, sizes and dict(sorted(sizes.items())), record.get("samples")])


def _read(path: Path) -> list[Record]:
    """Every whole line; what a killed run left broken is skipped."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """What changed, in words; empty if nothing did."""
    return changes(before, now) if isinstance(before, dict) else "the file does not say what it is of"
