"""The commands of launch/, run inside this process."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from mbridge_prune import cli

LAUNCH = Path(__file__).resolve().parents[1] / "launch"


class Said(NamedTuple):
    code: int
    out: str
    err: str


def launched(name: str) -> ModuleType:
    """launch/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def running(name: str, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """`run(*arguments)`: as `python launch/<name>.py` would; the log is left as it was found."""
    command, log = launched(name), logging.getLogger("mbridge_prune")
    before = (log.propagate, log.level, list(log.handlers))

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = cli.run(command.main, [str(a) for a in arguments])
        return Said(code, *capsys.readouterr())

    yield run
    for handler in log.handlers:
        handler.close()
    log.propagate, log.level, log.handlers = before
