"""Fixtures that the whole suite shares: tiny Hugging Face models, written once a session; the command."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import Said, running
from hypothesis import settings
from matrix import write_source

import mbridge_prune  # noqa: F401  (the CPU stand-ins, before anything imports Megatron)

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, derandomize=True)  # no timing, no luck in a test
settings.load_profile("suite")


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`hf_folder(family)`: the folder of a tiny random model of that family, written once."""
    root = tmp_path_factory.mktemp("hf")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            write_source(family, path)
        return path

    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """`run(*arguments)`: the command, as `python launch/prune.py` would run it."""
    with running("prune", capsys) as call:
        yield call


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """What a command that ran in this process did to the loggers is undone: tests read the log."""
    log, root = logging.getLogger("mbridge_prune"), logging.getLogger()

    def undo() -> None:
        logging.disable(logging.NOTSET)
        log.propagate, log.disabled = True, False
        log.setLevel(logging.NOTSET)
        root.setLevel(logging.WARNING)

    undo()
    yield
    undo()
