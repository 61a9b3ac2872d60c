"""A tiny parent, a smaller child, indexed datasets of random tokens, and the command inside this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Said, running
from models import VOCAB, write_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LENGTH = 16


def save_tokenizer(folder: Path, swapped: bool = False) -> None:
    """One word a token; `swapped` gives two words each other's number."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    if swapped:
        words["w3"], words["w4"] = 4, 3
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_dataset(prefix: Path, documents: int, seed: int, vocab: int = VOCAB) -> None:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab))
    for _ in range(documents):
        n = int(torch.randint(10, 60, (1,), generator=generator))
        builder.add_document(torch.randint(3, vocab, (n,), generator=generator), [n])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `teacher/`, `student/` (fewer layers, a smaller FFN), `train`, `other` and `valid`."""
    root = tmp_path_factory.mktemp("distill")
    write_hf("llama_tied", root / "teacher", seed=3)
    write_hf("llama_tied", root / "student", seed=4, intermediate_size=64, num_hidden_layers=3)
    for name in ("teacher", "student"):
        save_tokenizer(root / name)
    for seed, name in enumerate(("train", "other", "valid")):
        write_dataset(root / name, 60, seed)
    return root


def arguments(site: Path, output: Path, *more: object) -> list[str]:
    """Of a run of six steps that works; later ones win."""
    words = [
        "--teacher", site / "teacher", "--student", site / "student", "--data", site / "train", "--valid-data",
        site / "valid", "--seq-length", LENGTH, "--gbs", 4, "--mbs", 2, "--steps", 6, "--warmup-steps", 1,
        "--lr", "1e-3", "--eval-interval", 3, "--eval-iters", 1, "--save-interval", 3, "--log-interval", 2,
        "--num-workers", 0, "--output", output, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


@pytest.fixture
def distil(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Said]]:
    """`distil(*arguments)`, as `python launch/distill.py` would."""
    with running("distill", capsys) as call:
        yield call


def losses(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
