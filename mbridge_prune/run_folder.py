"""The folder of a run: begun once, taken up again by the same settings, finished, never overwritten."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from mbridge_prune import config, runtime
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
PLAN, SETTINGS, CANDIDATES = "plan.json", "settings.json", "candidates.jsonl"
RUNNERS_UP = "candidates"
"""Folder of the exported candidates, 01 the best."""


BUDGETS = (*config.BUDGETS, "latency_ms")


class Settings(Protocol):
    """The settings of a command that leaves a run folder."""

    def to_dict(self) -> dict[str, Any]: ...

    def run_folder(self) -> Path: ...

    def result(self) -> Path: ...


def finished(settings: Settings) -> bool:
    """True where the run folder holds the finished result of exactly these settings."""
    folder, now = settings.run_folder(), settings.to_dict()
    plan, begun = _read(folder / PLAN), _read(folder / SETTINGS)
    return plan.get("settings") == begun == now and settings.result().exists()


def same_run(begun: Mapping[str, Any], now: Settings) -> bool:
    """True where a run goes on in its folder: a search may be another, the rest is the same."""
    return _apart_from_search(begun) == _apart_from_search(now.to_dict())


def _apart_from_search(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run another run, which are all of them where nothing is searched.

    How many samples are kept aside stays: the scores are of the others.
    """
    search = settings.get("search", {})
    if not any(search.get(budget) is not None for budget in BUDGETS):
        return dict(settings)
    prune = {k: v for k, v in settings["prune"].items() if not k.endswith("_divisor")}
    return {**settings, "prune": prune, "search": {"num_samples": search.get("num_samples")}}


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's keys; none where it is missing or broken."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_run_folder(settings: Settings, same: Callable[[Mapping[str, Any], Any], bool] = same_run) -> bool:
    """A run folder is empty, or was begun with the same settings and is taken up again (True).

    Args:
        same: f(settings it was begun with, settings now) -> whether it is taken up again.

    Raises:
        UserError: it is another run's. Another search goes on there: its log says what is used again.
    """
    folder = settings.run_folder()
    problem, again = None, False
    if runtime.rank() == 0 and folder.exists():
        begun = folder / SETTINGS
        if not folder.is_dir():
            problem = f"{folder} is a file; give a folder for the run"
        elif begun.is_file():
            if not same(_read(begun), settings):
                problem = f"run folder {folder} was begun with other settings; give another --output"
            else:
                again = True
                log.info("taking up the run in %s again", folder)
        elif any(folder.iterdir()):
            problem = f"run folder {folder} is not empty; give another --output"
    problem, again = runtime.gather_objects((problem, again))[0]
    if problem:
        raise UserError(problem)
    return again


class timed:
    """Adds the seconds of its block to a dict."""

    def __init__(self, name: str, times: dict[str, float]):
        self.name, self.times = name, times

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self.times[self.name] = round(time.monotonic() - self.begin, 2)
