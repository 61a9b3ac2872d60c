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
from mbridge_prune.files import changes, free_name

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


def another_search(begun: Mapping[str, Any], now: Settings) -> bool:
    """True of two searches where the later can use nothing of the former, and reads nothing of its folder."""
    settings, folder = now.to_dict(), now.run_folder().resolve()
    given = [value for key in ("model", "calibration", "prune", "search") for value in settings[key].values()]
    paths = [part for value in given if isinstance(value, str) for part in value.split(",")]
    reads = any(Path(path).expanduser().resolve().is_relative_to(folder) for path in paths)
    return _searches(begun) and _searches(settings) and not reads and not same_run(begun, now)


def _searches(settings: Mapping[str, Any]) -> bool:
    search = settings.get("search", {})
    return any(search.get(budget) is not None for budget in BUDGETS)


def _apart_from_search(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run another run, which are all of them where nothing is searched.

    How many samples are kept aside stays: the scores are of the others.
    """
    search = settings.get("search", {})
    if not _searches(settings):
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


def check_run_folder(
    settings: Settings,
    same: Callable[[Mapping[str, Any], Any], bool] = same_run,
    anew: Callable[[Mapping[str, Any], Any], bool] = lambda begun, now: False,
) -> bool:
    """A run folder is empty, or what is in it may be taken up or replaced (True).

    Args:
        same: f(settings it was begun with, settings now) -> whether it is taken up again.
        anew: likewise, of one that is not: whether `set_aside` may move it out of the way.

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
            before = _read(begun)
            again = same(before, settings)
            if again:
                log.info("taking up the run in %s again", folder)
            elif anew(before, settings):
                again = True
            else:
                what = _changed(before, settings)
                problem = f"run folder {folder} was begun with other settings ({what}); give another --output"
        elif any(folder.iterdir()):
            problem = f"run folder {folder} is not empty; give another --output"
    problem, again = runtime.gather_objects((problem, again))[0]
    if problem:
        raise UserError(problem)
    return again


def set_aside(settings: Settings) -> None:
    """Gives a former run's folder another name where `check_run_folder` allowed that, and says why."""
    folder, problem = settings.run_folder(), None
    if runtime.rank() == 0 and (folder / SETTINGS).is_file():
        before = _read(folder / SETTINGS)
        if not same_run(before, settings):
            aside = free_name(folder)
            try:
                folder.rename(aside)
            except OSError as error:  # a mount point, as in a container
                problem = f"{folder} is of another search and cannot be moved: {error}; give another --output"
            else:
                what = _changed(before, settings)
                log.warning("a new search begins (%s); the former run is kept in %s", what, aside)
    problem = runtime.gather_objects(problem)[0]
    if problem:
        raise UserError(problem)


def _changed(begun: Mapping[str, Any], now: Settings) -> str:
    return changes(_flat(begun), _flat(now.to_dict())) or "its settings.json is broken"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """section.key -> value"""
    return {
        f"{section}.{key}": value
        for section, keys in settings.items() if isinstance(keys, Mapping)
        for key, value in keys.items()
    }  # fmt: skip


class timed:
    """Adds the seconds of its block to a dict."""

    def __init__(self, name: str, times: dict[str, float]):
        self.name, self.times = name, times

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self.times[self.name] = round(time.monotonic() - self.begin, 2)
