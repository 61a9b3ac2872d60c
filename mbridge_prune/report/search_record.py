"""candidates.jsonl, the record of a search, read back; docs/report.md documents its keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOWER_IS_BETTER = ("kl", "loss")
Sizes = tuple[tuple[str, int], ...]


@dataclass
class Candidate:
    """Everything the search found out about one subnet.

    Args:
        sizes: size of every hparam.
        kl, se, samples: the measurement on the most text.
        scores: name of a score function -> value.
        facts: `active_params`, `memory_mb`, `seconds`, where the search wrote them.
    """

    sizes: dict[str, int]
    params: float | None = None
    predicted: float | None = None
    kl: float | None = None
    se: float | None = None
    samples: int = 0
    round: int = -1
    scores: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Search:
    """The last search of the file, by kind of record; a kind that is not there is empty."""

    head: dict[str, Any] = field(default_factory=dict)
    axis: list[Candidate] = field(default_factory=list)
    pairs: list[Candidate] = field(default_factory=list)
    surrogate: dict[str, Any] = field(default_factory=dict)
    cloud: list[tuple[float, float]] = field(default_factory=list)
    """(parameters, predicted)."""
    halving: list[Candidate] = field(default_factory=list)
    """Each candidate once, as measured in its last round."""
    rounds: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Round -> (candidates, samples)."""
    scored: list[Candidate] = field(default_factory=list)
    """What the score function saw, best first."""
    score_name: str = ""
    winner: Candidate | None = None
    broken: list[int] = field(default_factory=list)
    """Numbers of lines that are no record; the last line of a killed run is not among them."""

    @property
    def full(self) -> dict[str, int]:
        return self.head.get("full", {})

    @property
    def lower_is_better(self) -> bool:
        return self.score_name in LOWER_IS_BETTER

    def cut(self, candidate: Candidate) -> dict[str, int]:
        """What a candidate changes."""
        return {h: n for h, n in candidate.sizes.items() if self.full.get(h) != n}


def read_search(path: Path) -> Search | None:
    """The search that the file records, or None without one."""
    if not path.is_file():
        return None
    records, broken = _records(path)
    heads = [place for place, record in enumerate(records) if record.get("kind") == "search"]
    if heads:
        # What came before a change of settings, data or model belongs to another search.
        last = records[heads[-1]].get("fingerprint")
        others = [p for p in heads if records[p].get("fingerprint") != last]
        records = records[max(others, default=-1) + 1 :]
    if not records:
        return None
    search = Search(broken=broken)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(str(record.get("kind")), []).append(record)
    search.head = by_kind.get("search", [{}])[-1]
    search.surrogate = by_kind.get("surrogate", [{}])[-1]
    search.axis = [_candidate(r, search.full) for r in by_kind.get("axis", [])]
    search.pairs = [_candidate(r, search.full) for r in by_kind.get("pair", [])]
    for record in by_kind.get("cloud", []):
        points = zip(record.get("params", []), record.get("predicted", []), strict=False)
        search.cloud = [(float(x), float(y)) for x, y in points if _number(x) and _number(y)]
    _halving(search, by_kind.get("halving", []))
    _scores(search, by_kind.get("score", []))
    if winners := by_kind.get("winner"):
        _winner(search, winners[-1])
    return search


def _records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records, and the numbers of the lines that are none (but for a last one, cut short by a kill)."""
    records, broken = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("sizes", {}), dict):
            records.append(record)
        elif number < len(lines):
            broken.append(number)
    return records, broken


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _key(sizes: Mapping[str, int]) -> Sizes:
    return tuple(sorted(sizes.items()))


def _candidate(record: Mapping[str, Any], full: Mapping[str, int]) -> Candidate:
    """A record's sizes laid over the full ones, and its numbers."""

    def value(key: str) -> float | None:
        return float(record[key]) if _number(record.get(key)) else None

    return Candidate(
        sizes={**full, **record.get("sizes", {})},
        params=value("params"),
        predicted=value("predicted"),
        kl=value("kl"),
        se=value("se"),
        samples=int(value("samples") or 0),
    )


def _halving(search: Search, records: list[dict[str, Any]]) -> None:
    found: dict[Sizes, Candidate] = {}
    in_round: dict[int, set[Sizes]] = {}
    samples: dict[int, int] = {}
    for record in records:
        candidate = _candidate(record, search.full)
        candidate.round = int(record.get("round") or 0)
        key = _key(candidate.sizes)
        in_round.setdefault(candidate.round, set()).add(key)
        samples[candidate.round] = candidate.samples
        if key not in found or candidate.round >= found[key].round:
            found[key] = candidate
    search.halving = list(found.values())
    search.rounds = {r: (len(in_round[r]), samples[r]) for r in sorted(in_round)}


def _scores(search: Search, records: list[dict[str, Any]]) -> None:
    measured = {_key(c.sizes): c for c in search.halving}
    scored: dict[Sizes, Candidate] = {}
    for record in records:
        if not _number(record.get("score")):
            continue
        new = _candidate(record, search.full)
        key = _key(new.sizes)
        candidate = scored.setdefault(key, measured.get(key, new))
        candidate.params = candidate.params if candidate.params is not None else new.params
        name = search.score_name = str(record.get("name") or "score")
        candidate.scores[name] = float(record["score"])
        for fact in ("active_params", "memory_mb", "seconds"):
            if _number(record.get(fact)):
                candidate.facts[fact] = float(record[fact])
    name, sign = search.score_name, 1 if search.lower_is_better else -1
    with_score = [c for c in scored.values() if name in c.scores]
    search.scored = sorted(with_score, key=lambda c: (sign * c.scores[name], _key(c.sizes)))


def _winner(search: Search, record: dict[str, Any]) -> None:
    new = _candidate(record, search.full)
    same = (c for c in [*search.scored, *search.halving] if c.sizes == new.sizes)
    search.winner = next(same, new)
    if search.winner.params is None:
        search.winner.params = new.params
    if _number(record.get("score")) and search.score_name not in search.winner.scores:
        search.winner.scores[search.score_name or "score"] = float(record["score"])
