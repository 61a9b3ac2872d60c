"""The questions of MMLU (Hendrycks et al. 2021, arXiv 2009.03300), from a local copy or the hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbridge_prune.errors import UserError, nearest

HUB = "cais/mmlu"
LETTERS = ("A", "B", "C", "D")
SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine",
    "college_physics", "computer_security", "conceptual_physics", "econometrics", "electrical_engineering",
    "elementary_mathematics", "formal_logic", "global_facts", "high_school_biology",
    "high_school_chemistry", "high_school_computer_science", "high_school_european_history",
    "high_school_geography", "high_school_government_and_politics", "high_school_macroeconomics",
    "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history",
    "high_school_world_history", "human_aging", "human_sexuality", "international_law", "jurisprudence",
    "logical_fallacies", "machine_learning", "management", "marketing", "medical_genetics",
    "miscellaneous", "moral_disputes", "moral_scenarios", "nutrition", "philosophy", "prehistory",
    "professional_accounting", "professional_law", "professional_medicine", "professional_psychology",
    "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip
"""The paper's 57."""
EVERYTHING = "all"
"""The folder of the hub's copy that repeats every other."""


@dataclass(frozen=True)
class Question:
    """A question, its four choices, and the place of the right one (0 to 3)."""

    question: str
    choices: tuple[str, ...]
    answer: int


Questions = dict[str, list[Question]]
"""Subject -> its questions, in the order of the file."""


def read_mmlu(source: str | Path | None, split: str, subjects: Sequence[str] = SUBJECTS) -> Questions:
    """The questions of one split.

    Args:
        source: a folder with .arrow, .parquet, .jsonl or the paper's .csv files, whose names or folders
            say the split (`abstract_algebra/test/data.arrow`, `all/test-00000-of-00001.parquet`,
            `dev/anatomy_dev.csv`, `test.jsonl`) and, where the records have no key `subject`, the
            subject; None reads `cais/mmlu` from the hub.
        split: "test", or "dev" (the five examples of the few-shot prompt).
        subjects: those wanted; each must be there.

    Raises:
        UserError: no such folder, subjects that are missing, broken records (by file and row), or a hub
            that cannot be reached.
    """
    unknown = [subject for subject in subjects if subject not in SUBJECTS]
    if unknown:
        raise UserError(f"no MMLU subject {unknown[0]!r}{nearest(unknown[0], SUBJECTS)}")
    found: Questions = {subject: [] for subject in subjects}
    for subject, question in _hub(split) if source is None else _folder(Path(source).expanduser(), split):
        if subject in found:
            found[subject].append(question)
    missing = [subject for subject, questions in found.items() if not questions]
    if missing:
        where, more = source or HUB, f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{where} has no {split} questions of {', '.join(missing[:3])}{more}")
    return found


def _folder(folder: Path, split: str) -> Iterator[tuple[str, Question]]:
    if not folder.is_dir():
        raise UserError(f"no such folder of MMLU data: {folder}")
    files = {path: path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix in READERS}
    files = {path: inner for path, inner in files.items() if path.is_file() and _split(inner) == split}
    if not files:
        kinds = ", ".join(READERS)
        raise UserError(f"{folder} holds no {split} questions: no {kinds} file there is named after it")
    by_subject = {path: _subject(inner) for path, inner in files.items()}
    for path, named in by_subject.items():
        if EVERYTHING in files[path].parts and any(by_subject.values()):
            continue
        number = 0
        try:
            for number, row in enumerate(READERS[path.suffix](path), start=1):
                yield _question(row, named, f"{path}, row {number}")
        except (OSError, ValueError, LookupError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot read {path} after row {number}: {first}") from error


def _split(inner: Path) -> str | None:
    words = re.split(r"[-_./ ]", str(inner).lower())
    return next((split for split in ("test", "dev", "validation", "val") if split in words), None)


def _subject(inner: Path) -> str | None:
    stem = re.sub(r"_(test|dev|val|validation)$", "", inner.stem)
    return next((part for part in (stem, *inner.parts[:-1]) if part in SUBJECTS), None)


def _question(row: Any, named: str | None, where: str) -> tuple[str, Question]:
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= row.keys():
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: expected the keys question, choices and answer, found: {keys}")
    subject, choices, answer = row.get("subject") or named, row["choices"], row["answer"]
    if subject is None:
        raise UserError(f"{where}: no subject, neither a key nor the name of the file or its folder")
    if len(choices) != len(LETTERS):
        raise UserError(f"{where}: {len(choices)} choices, expected 4")
    place = LETTERS.index(answer) if answer in LETTERS else answer
    if place not in range(len(LETTERS)):
        raise UserError(f"{where}: answer={answer!r}, expected 0 to 3 or A to D")
    return subject, Question(str(row["question"]), tuple(map(str, choices)), int(place))


def _arrow(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()  # what `datasets` writes
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
        yield from table.to_pylist()


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    yield from pq.read_table(path).to_pylist()


def _jsonl(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def _csv(path: Path) -> Iterator[Any]:
    """The paper's own files: question, four choices, letter; no header."""
    with open(path, encoding="utf-8", newline="") as lines:
        for question, *choices, answer in csv.reader(lines):
            yield {"question": question, "choices": choices, "answer": answer}


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".arrow": _arrow, ".parquet": _parquet, ".jsonl": _jsonl, ".csv": _csv,
}  # fmt: skip


def _hub(split: str) -> Iterator[tuple[str, Question]]:
    try:
        import datasets

        rows = datasets.load_dataset(HUB, "all", split=split)
    except Exception as error:  # the hub client fails in many ways: say which, and what to do
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"cannot read {HUB} from the hub: {first}; give a local copy (a folder of .arrow, .parquet, "
            ".jsonl or .csv files, --mmlu-data)"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield _question(row, None, f"{HUB}, {split} row {number}")
