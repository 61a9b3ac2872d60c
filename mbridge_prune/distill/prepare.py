"""Text into a Megatron indexed dataset: PREFIX.bin, PREFIX.idx, and PREFIX.json saying how it was made.

python launch/prepare_data.py --tokenizer Qwen/Qwen3-8B --input text.jsonl --output data/train
"""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mbridge_prune.bridge.load import load_tokenizer
from mbridge_prune.calibration.packing import end_of_text_id
from mbridge_prune.calibration.text import read_documents
from mbridge_prune.config import Parser
from mbridge_prune.distill.data import SIDECAR
from mbridge_prune.distill.models import vocabulary_fingerprint
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
AT_ONCE = 64
"""Documents that the tokenizer gets in one call."""
SECONDS_BETWEEN_LINES = 30.0
"""Of the log, while it works."""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="prepare_data.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--input", required=True, help=".txt/.jsonl/.parquet file, a folder, or a dataset name"
    )
    parser.add_argument("--output", required=True, help="prefix of the files to write")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder or hub name of the teacher")
    parser.add_argument("--split", default="train", help="split of a folder or dataset (default: train)")
    parser.add_argument("--text-key", default="text", help="key of the text in a record (default: text)")
    parser.add_argument("--chat-template", action="store_true", help="render messages with the chat template")
    parser.add_argument("--eod", help="token put after every document (default: <|endoftext|> or eos)")
    parser.add_argument(
        "--valid-share", type=float, default=0, help="of the documents, drawn, into PREFIX-valid (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of that draw (default: 1234)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own code")
    given = parser.parse_args(list(arguments))
    tokenizer = load_tokenizer(given.tokenizer, given.trust_remote_code)
    if tokenizer is None:
        raise UserError(f"no tokenizer in {given.tokenizer}")
    documents = read_documents(given.input, split=given.split, text_key=given.text_key,
                               chat_template=given.chat_template, tokenizer=tokenizer)  # fmt: skip
    made = {"tokenizer": given.tokenizer, "input": given.input, "split": given.split}
    if given.valid_share:
        made |= {"valid_share": given.valid_share, "seed": given.seed}
    written = prepare(documents, tokenizer, Path(given.output), eod=given.eod, valid_share=given.valid_share,
                      seed=given.seed, made=made)  # fmt: skip
    for prefix, note in written.items():
        log.info("wrote %s.bin and .idx: %s documents, %s tokens", prefix, f"{note['documents']:,}",
                 f"{note['tokens']:,}")  # fmt: skip
    return 0


def prepare(
    documents: Iterator[str], tokenizer: Any, prefix: Path, *, eod: str | None = None, valid_share: float = 0,
    seed: int = 1234, made: dict[str, Any] | None = None,
) -> dict[Path, dict[str, Any]]:  # fmt: skip
    """Writes an indexed dataset, with megatron-core's own builder; nothing half-written keeps its name.

    Args:
        documents: texts; each becomes one document, with the end-of-document token behind it.
        eod: that token's text, where it is not the one that calibration separates documents with.
        valid_share: the probability of a document to go to a second dataset, PREFIX-valid, instead.
        seed: of these draws: the same input is always split in the same way.
        made: what else to note in PREFIX.json.

    Returns:
        Prefix -> the content of its .json: documents, tokens, vocabulary (a fingerprint), and `made`.

    Raises:
        UserError: the files are there, cannot be written, there is no text, or no such token.
    """
    if not 0 <= valid_share < 1:
        raise UserError(f"--valid-share {valid_share:g} must be from 0 to below 1, such as 0.001")
    end, draw = _end_of_document(tokenizer, eod), random.Random(seed)
    note = {"eod": end, "vocabulary": vocabulary_fingerprint(tokenizer), **(made or {})}
    prefixes = [prefix, prefix.with_name(f"{prefix.name}-valid")][: 2 if valid_share else 1]
    parts: list[_Dataset] = []
    began = said = time.monotonic()
    try:
        for one in prefixes:
            parts.append(_Dataset(one, len(tokenizer)))
        while texts := list(islice(documents, AT_ONCE)):
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                parts[valid_share > 0 and draw.random() < valid_share].add([*ids, end])
            if (now := time.monotonic()) - said >= SECONDS_BETWEEN_LINES:
                said, tokens = now, sum(part.tokens for part in parts)
                log.info("%s documents, %s tokens, %s a second", f"{sum(part.documents for part in parts):,}",
                         f"{tokens:,}", f"{tokens / (now - began):,.0f}")  # fmt: skip
        whole = sum(part.documents for part in parts)
        if not whole:
            raise UserError("the input holds no text")
        for part in parts:
            if not part.documents:
                raise UserError(f"no document of {whole:,} fell to {part.prefix}: change --valid-share")
        notes = {part.prefix: part.finish(note) for part in parts}
        for part in parts:
            part.put_in_place()
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error}") from error
    finally:
        for part in parts:
            part.close()
    return notes


class _Dataset:
    """An indexed dataset that is written under other names, until `put_in_place`."""

    def __init__(self, prefix: Path, vocab_size: int):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix, self.documents, self.tokens = prefix, 0, 0
        self.final = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", SIDECAR)]
        for path in self.final:
            if path.exists():
                raise UserError(f"{path} exists; give another --output")
        self.aside = [path.with_name(f".{path.name}.partial") for path in self.final]
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self.builder = IndexedDatasetBuilder(str(self.aside[0]), dtype=DType.optimal_dtype(vocab_size))

    def add(self, ids: list[int]) -> None:
        self.builder.add_document(torch.tensor(ids), [len(ids)])
        self.documents, self.tokens = self.documents + 1, self.tokens + len(ids)

    def finish(self, note: Mapping[str, Any]) -> dict[str, Any]:
        """Writes index and note; returns the note."""
        self.builder.finalize(str(self.aside[1]))
        whole = {"documents": self.documents, "tokens": self.tokens, **note}
        self.aside[2].write_text(json.dumps(whole, indent=1) + "\n")
        return whole

    def put_in_place(self) -> None:
        for part, path in zip(self.aside, self.final, strict=True):
            os.replace(part, path)

    def close(self) -> None:
        self.builder.data_file.close()
        for part in self.aside:
            part.unlink(missing_ok=True)


def _end_of_document(tokenizer: Any, eod: str | None) -> int:
    if eod is not None:
        number = tokenizer.get_vocab().get(eod)
        if number is None:
            raise UserError(f"--eod {eod!r} is no token of the tokenizer")
        return number
    return end_of_text_id(tokenizer)
