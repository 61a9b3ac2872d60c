"""A tiny model whose tokenizer writes English, a few questions, and the command run inside this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import questions
import torch
from commands import Said, running
from models import load, load_hf, tokens, write_hf
from transformers import AutoTokenizer

from mbridge_prune.evaluate.mmlu_data import SUBJECTS

VOCAB = 320
PARENT, CHILD = "parent", "child"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `parent` and `child` (half the FFN, 3 layers of 4), `text.txt`, questions
    of three subjects in `mmlu/` and of all in `mmlu57/`."""
    root = tmp_path_factory.mktemp("evaluate")
    write_hf("llama_tied", root / PARENT, seed=3, vocab_size=VOCAB)
    write_hf("llama_tied", root / CHILD, seed=4, vocab_size=VOCAB, intermediate_size=48, num_hidden_layers=3)
    for name in (PARENT, CHILD):
        questions.tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    questions.write(root / "mmlu")
    questions.write(root / "mmlu57", SUBJECTS, tests=2)
    return root


@pytest.fixture(scope="session")
def tokenizer(site: Path) -> Any:
    return AutoTokenizer.from_pretrained(site / PARENT)


@pytest.fixture(scope="session")
def megatron(site: Path) -> Callable[[str], Any]:
    """`megatron(name)`: the unwrapped Megatron model of the site, loaded once."""
    loaded: dict[str, Any] = {}

    def get(name: str = PARENT) -> Any:
        if name not in loaded:
            loaded[name] = load(site / name).unwrapped_model
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def plain(site: Path) -> Callable[[str], Any]:
    """`plain(name)`: the same model in transformers."""
    loaded: dict[str, Any] = {}

    def get(name: str = PARENT) -> Any:
        if name not in loaded:
            loaded[name] = load_hf(site / name)
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def text_ns() -> torch.Tensor:
    return tokens(5, length=20, vocab=VOCAB)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """`run(*arguments)`: the command, as `python launch/evaluate.py` would run it."""
    with running("evaluate", capsys) as call:
        yield call


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
