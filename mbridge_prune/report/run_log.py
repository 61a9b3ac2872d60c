"""What run.log says: where the run ran, how long its steps took, what it warned of."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ENTRY = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d):\d\d,\d+ ([A-Z]+) (.*)")
STEP = re.compile(r"([a-z][\w /-]*): ([\d,]+ \w+) in ([\d.]+) s")
HOST = "mbridge_prune on "


@dataclass
class RunLog:
    """Args:
    when: date and time of the last line.
    where: host, devices, dtype, backend.
    steps: (step, what it went through, seconds), as logged.
    warnings: each said once.
    """

    when: str = ""
    where: str = ""
    steps: list[tuple[str, str, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_log(path: Path) -> RunLog:
    """The log of the run, or an empty one. A run taken up again says of each step what it did last."""
    log = RunLog()
    if not path.is_file():
        return log
    steps: dict[str, tuple[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = ENTRY.match(line)
        if not entry:
            continue
        day, clock, level, said = entry.groups()
        log.when = f"{day} {clock}"
        if said.startswith(HOST):
            log.where = said.removeprefix(HOST)
        elif level != "INFO" and said not in log.warnings:
            log.warnings.append(said)
        elif step := STEP.match(said):
            steps[step[1]] = (step[2], float(step[3]))
    log.steps = [(name, *rest) for name, rest in steps.items()]
    return log
