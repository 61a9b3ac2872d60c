"""A model whose tokenizer writes English, text, MMLU's questions, and the command run inside this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluate import questions
from models import write_hf

from mbridge_prune.evaluate.mmlu_data import SUBJECTS


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/`, `text.txt`, and two questions of every MMLU subject in `mmlu/`."""
    root = tmp_path_factory.mktemp("spoken")
    write_hf("llama_tied", root / "model", seed=3, vocab_size=320, max_position_embeddings=512)
    questions.tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    questions.write(root / "mmlu", SUBJECTS, tests=2)
    return root


@pytest.fixture
def searching(spoken: Path, tmp_path: Path) -> list[str]:
    """Arguments of a search that works; later ones win."""
    return [
        "--hf-path", f"{spoken}/model", "--calib-data", f"{spoken}/text.txt", "--calib-num-samples", "6",
        "--seq-length", "12", "--hidden-size-divisor", "16", "--ffn-hidden-size-divisor", "32",
        "--num-layers-divisor", "1", "--prune-target-params", "80%", "--max-width-pruning", "0.5",
        "--max-depth-pruning", "0.5", "--search-num-samples", "6", "--top-k", "2",
        "--output", f"{tmp_path}/run",
    ]  # fmt: skip
