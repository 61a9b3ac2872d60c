"""candidates.jsonl, the log of a search, read back; docs/report.md documents its keys."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEGATED = ("kl", "loss")
"""Scores that are losses: the search negates them, because its higher is better; the page does not."""
FACTS = ("active_params", "memory_mb", "flops", "seconds")
Record = dict[str, Any]
Key = tuple[tuple[str, int], ...]


@dataclass
class Candidate:
    """Everything the search found out about one subnet.

    Args:
        sizes: size of every hparam.
        kl, se, samples: one measurement; of several, that on the most text.
        scores: name of a score function -> value, as it is said (KL and loss are positive).
        facts: what else it costs, by the names in FACTS.
    """

    sizes: dict[str, int]
    params: float | None = None
    predicted: float | None = None
    kl: float | None = None
    se: float | None = None
    samples: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return tuple(sorted(self.sizes.items()))


@dataclass
class Search:
    """A search, by kind of record; a kind that is not there is empty."""

    head: Record = field(default_factory=dict)
    in_budget: int | None = None
    surrogate: Record = field(default_factory=dict)
    cloud: list[tuple[float, float]] = field(default_factory=list)
    """(parameters, predicted KL)."""
    axis: list[Candidate] = field(default_factory=list)
    checks: list[Candidate] = field(default_factory=list)
    """Measured to check the surrogate."""
    halving: list[Candidate] = field(default_factory=list)
    """Each candidate once, as measured in its last round."""
    rounds: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Round -> (candidates, samples)."""
    measured: list[Candidate] = field(default_factory=list)
    """Everything but the single cuts, each candidate once."""
    scored: list[Candidate] = field(default_factory=list)
    """What the score function saw, best first."""
    score_name: str = ""
    winner: Candidate | None = None
    broken: list[int] = field(default_factory=list)
    """Numbers of the lines that are no whole record."""
    repaired: bool = False
    """Scores are of repaired candidates, measurements of plain slices."""

    @property
    def full(self) -> dict[str, int]:
        return self.head.get("full", {})

    @property
    def budgets(self) -> dict[str, float]:
        return self.head.get("budgets", {})

    @property
    def lower_is_better(self) -> bool:
        return self.score_name in NEGATED

    def cut(self, candidate: Candidate) -> dict[str, int]:
        """What a candidate changes."""
        return {h: n for h, n in candidate.sizes.items() if self.full.get(h) != n}


def read_search(path: Path) -> Search | None:
    """The search that the file records, or None without one."""
    if not path.is_file():
        return None
    records, broken = _records(path)
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(str(record.get("kind")), []).append(record)
    if not set(kinds) - {"identity"}:
        return None
    search = Search(head=_last(kinds, "search"), surrogate=_last(kinds, "surrogate"), broken=broken)
    identity = _last(kinds, "identity").get("identity") or {}
    search.repaired = (identity.get("repair") or ["none"])[0] != "none"
    search.axis = [_candidate(r, search.full) for r in kinds.get("axis", [])]
    search.checks = [_candidate(r, search.full) for r in kinds.get("pair", [])]
    _cloud(search, _last(kinds, "cloud"))
    scored = [_candidate(r, search.full).key for r in kinds.get("score", [])]
    _halving(search, kinds.get("halving", []), scored)
    search.measured = list(_most_text([*search.checks, *search.halving]).values())
    _scores(search, kinds.get("score", []))
    _winner(search, _last(kinds, "winner"))
    return search


def _records(path: Path) -> tuple[list[Record], list[int]]:
    """The records, and the numbers of the lines that are none: a killed run leaves its last one broken."""
    records, broken = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("sizes", {}), dict):
            records.append(record)
        else:
            broken.append(number)
    return records, broken


def _last(kinds: Mapping[str, list[Record]], kind: str) -> Record:
    return kinds.get(kind, [{}])[-1]


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _candidate(record: Record, full: Mapping[str, int]) -> Candidate:
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
        facts={fact: float(record[fact]) for fact in FACTS if _number(record.get(fact))},
    )


def _most_text(candidates: list[Candidate]) -> dict[Key, Candidate]:
    """Each candidate once: the measurement on the most text."""
    best: dict[Key, Candidate] = {}
    for candidate in candidates:
        known = best.get(candidate.key)
        if known is None or candidate.samples >= known.samples:
            best[candidate.key] = candidate
    return best


def _cloud(search: Search, record: Record) -> None:
    points = zip(record.get("params", []), record.get("predicted", []), strict=False)
    search.cloud = [(float(x), float(y)) for x, y in points if _number(x) and _number(y)]
    inside = record.get("in_budget", search.head.get("in_budget"))
    search.in_budget = inside if isinstance(inside, int) else None


def _halving(search: Search, records: list[Record], scored: list[Key]) -> None:
    rounds: dict[int, list[Candidate]] = {}
    for record in records:
        rounds.setdefault(int(record.get("round") or 0), []).append(_candidate(record, search.full))
    search.halving = list(_most_text([c for number in sorted(rounds) for c in rounds[number]]).values())
    # A candidate that was measured before is not measured again: it is seen in what follows.
    seen = set(scored)
    for number in sorted(rounds, reverse=True):
        seen |= {c.key for c in rounds[number]}
        search.rounds[number] = (len(seen), max(c.samples for c in rounds[number]))
    search.rounds = dict(sorted(search.rounds.items()))


def _scores(search: Search, records: list[Record]) -> None:
    known = {c.key: c for c in search.measured}
    scored: dict[Key, Candidate] = {}
    for record in records:
        if not _number(record.get("score")):
            continue
        new = _candidate(record, search.full)
        candidate = scored.setdefault(new.key, known.get(new.key, new))
        candidate.params = new.params if candidate.params is None else candidate.params
        candidate.facts |= new.facts
        search.score_name = str(record.get("name") or "score")
        candidate.scores[search.score_name] = _said(search.score_name, record["score"])
    name, sign = search.score_name, 1 if search.lower_is_better else -1
    seen = [c for c in scored.values() if name in c.scores]
    for c in seen if name == "kl" and not search.repaired else ():
        if c.kl is None:
            c.kl = c.scores[name]
            search.measured.append(c)
    search.scored = sorted(seen, key=lambda c: (sign * c.scores[name], c.params or 0, c.key))


def _said(name: str, score: float) -> float:
    return abs(float(score)) if name in NEGATED else float(score)


def _winner(search: Search, record: Record) -> None:
    if not record:
        return
    new = _candidate(record, search.full)
    search.winner = next((c for c in [*search.scored, *search.measured] if c.key == new.key), new)
    if search.winner.params is None:
        search.winner.params = new.params
    if _number(record.get("score")):
        name = str(record.get("name") or search.score_name or "score")
        search.winner.scores.setdefault(name, _said(name, record["score"]))
