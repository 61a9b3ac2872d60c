"""The folder of a run: begun once, taken up again by the same settings, finished, never overwritten."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from mbridge_prune import config, runtime
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
PLAN, SETTINGS, CANDIDATES = "plan.json", "settings.json", "candidates.jsonl"


def finished(settings: config.Settings) -> bool:
    """True where the run folder holds the finished result of exactly these settings."""
    plan = settings.run_folder() / PLAN
    if not plan.is_file():
        return False
    same = json.loads(plan.read_text())["settings"] == settings.to_dict()
    return same and settings.hf_folder().is_dir()


def has_files(folder: Path) -> bool:
    """True for a folder with something in it; ours are renamed into place when complete."""
    return folder.is_dir() and any(folder.iterdir())


def check_run_folder(settings: config.Settings) -> bool:
    """A run folder is empty, or was begun with the same settings and is taken up again (True)."""
    folder = settings.run_folder()
    problem, again = None, False
    if runtime.rank() == 0 and folder.exists():
        begun = folder / SETTINGS
        if not folder.is_dir():
            problem = f"{folder} is a file; give a folder for the run"
        elif begun.is_file():
            if json.loads(begun.read_text()) != settings.to_dict():
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
