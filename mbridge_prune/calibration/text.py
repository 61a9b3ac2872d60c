"""Reads calibration documents from wherever the user has text: one iterator of strings.

A wrong path or a broken record costs hours when it shows only after the model is imported, so
every error names the file, the line and the way out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mbridge_prune.errors import UserError, nearest

END_OF_TEXT_LINE = "<|endoftext|>"  # a line holding only this ends a document in a .txt file
CHAT_KEYS = ("messages", "conversations")
TOKEN_SUFFIXES = (".npy", ".safetensors")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def read_documents(
    source: str | Path,
    *,
    split: str = "train",
    text_key: str = "text",
    chat_template: bool = False,
    tokenizer: Any = None,
) -> Iterator[str]:
    """Yield the non-empty documents of a source, in a fixed order.

    Args:
        source: a .txt file (documents end at a line holding only ``<|endoftext|>``; without such
            a line the file is one document), a .jsonl or .parquet file, a folder of these (sorted,
            recursive; when its files or folders are named after splits, only those of ``split``),
            or a Hugging Face dataset as ``name`` or ``name:config``, streamed.
        split: the split of a dataset or of a folder.
        text_key: the key of a record that holds the text.
        chat_template: render ``messages`` or ``conversations`` with the tokenizer's chat template.
        tokenizer: needed with ``chat_template``.

    Raises:
        UserError: at the call for a missing path or template, and while iterating for a broken
            file or record (named by file and line) or a dataset that cannot be reached.
    """
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "chat_template=True, but the tokenizer has no chat template; use plain text "
            "(chat_template=False) or a tokenizer that has one"
        )
    render = _Renderer(text_key, tokenizer if chat_template else None)
    path = Path(source).expanduser()
    if path.is_dir():
        files = _files_of(path, split)
        return (text for file in files for text in _READERS[file.suffix](file, render))
    if path.is_file():
        if path.suffix not in _READERS:
            hint = nearest(path.suffix, _READERS)
            raise UserError(f"{path} is not one of {', '.join(_READERS)}{hint}")
        return _READERS[path.suffix](path, render)
    if not _is_dataset_name(str(source)):
        raise UserError(f"no such file or folder: {source}{_nearest_sibling(path)}")
    return _dataset(str(source), split, render)


class _Renderer:
    """Turns one record (a JSON object or a table row) into its text."""

    def __init__(self, text_key: str, tokenizer: Any) -> None:
        self.text_key = text_key
        self.tokenizer = tokenizer

    def __call__(self, record: Any, where: str) -> str:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, found {type(record).__name__}")
        if self.tokenizer is not None:
            return self._chat(record, where)
        if self.text_key not in record:
            raise UserError(f"{where}: no key {self.text_key!r}{self._advice(record)}")
        text = record[self.text_key]
        if not isinstance(text, str):
            found = type(text).__name__
            raise UserError(f"{where}: {self.text_key!r} holds {found}, expected a string")
        return text

    def _advice(self, record: dict[str, Any]) -> str:
        chats = [key for key in CHAT_KEYS if key in record]
        if chats:
            return f"; set chat_template=True to render {chats[0]!r}"
        return f"{nearest(self.text_key, record)}; set text_key to one of: {', '.join(record)}"

    def _chat(self, record: dict[str, Any], where: str) -> str:
        key = next((key for key in CHAT_KEYS if key in record), None)
        if key is None:
            raise UserError(
                f"{where}: no key {' or '.join(map(repr, CHAT_KEYS))}, found: {', '.join(record)}; "
                "set chat_template=False for plain text"
            )
        try:
            turns = [_turn(turn) for turn in record[key]]
            return self.tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:  # a template is a program of the model's author
            raise UserError(f"{where}: cannot render {key!r}: {_one_line(error)}") from error


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    """One message as role and content, from that form or ShareGPT's ``from`` and ``value``."""
    if "from" in turn:
        role = turn["from"]
        return {"role": _SHAREGPT_ROLES.get(role, role), "content": turn["value"]}
    return {"role": turn["role"], "content": turn["content"]}


def _read_txt(path: Path, render: _Renderer) -> Iterator[str]:
    lines: list[str] = []
    try:
        with open(path, encoding="utf-8") as handle:
            for line in handle:
                if line.rstrip("\r\n") == END_OF_TEXT_LINE:
                    yield from _non_empty("".join(lines))
                    lines.clear()
                else:
                    lines.append(line)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {_one_line(error)}") from error
    yield from _non_empty("".join(lines))


def _read_jsonl(path: Path, render: _Renderer) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: broken JSON: {error.msg}") from error
                yield from _non_empty(render(record, where))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {_one_line(error)}") from error


def _read_parquet(path: Path, render: _Renderer) -> Iterator[str]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield from _non_empty(render(record, f"{path}, row {number}"))
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {_one_line(error)}") from error


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _dataset(source: str, split: str, render: _Renderer) -> Iterator[str]:
    name, _, config = source.partition(":")
    number = 0
    try:
        import datasets

        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield from _non_empty(render(record, f"{source}, row {number}"))
    except UserError:
        raise
    except Exception as error:  # the hub client fails in many ways: say which, and what to do
        raise UserError(
            f"cannot read the dataset {source!r} (split {split!r}): {_one_line(error)}; give the "
            "path of a local .txt, .jsonl or .parquet file or folder instead"
        ) from error


def _files_of(folder: Path, split: str) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in _READERS and path.is_file())
    if not files:
        raise UserError(f"{folder} holds no {', '.join(_READERS)} file")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    named = sorted({name for name in splits.values() if name})
    if not named:
        return files
    wanted = next((name for name, words in _SPLIT_WORDS.items() if split in words), split)
    if wanted not in named:
        raise UserError(f"{folder} has no split {split!r}; it has: {', '.join(named)}")
    return [file for file, name in splits.items() if name == wanted]


def _split_of(relative: Path) -> str | None:
    """The split that a file's name (``train-00000-of-00009.parquet``) or folder stands for."""
    for part in (relative.stem, *reversed(relative.parts[:-1])):
        first = re.split(r"[-_.]", part.lower())[0]
        for split, words in _SPLIT_WORDS.items():
            if first in words:
                return split
    return None


def _is_dataset_name(source: str) -> bool:
    known_file = Path(source).suffix in (*_READERS, *TOKEN_SUFFIXES, ".json", ".gz", ".zst")
    return not known_file and bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source))


def _nearest_sibling(path: Path) -> str:
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    return nearest(path.name, siblings)


def _non_empty(text: str) -> Iterator[str]:
    if text.strip():
        yield text


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
