"""Text into a Megatron indexed dataset: PREFIX.bin, PREFIX.idx, and PREFIX.json saying how it was made.

python launch/prepare_data.py --tokenizer Qwen/Qwen3-8B --input text.jsonl --output data/train
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
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
    parser.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own code")
    given = parser.parse_args(list(arguments))
    tokenizer = load_tokenizer(given.tokenizer, given.trust_remote_code)
    if tokenizer is None:
        raise UserError(f"no tokenizer in {given.tokenizer}")
    documents = read_documents(given.input, split=given.split, text_key=given.text_key,
                               chat_template=given.chat_template, tokenizer=tokenizer)  # fmt: skip
    made = {"tokenizer": given.tokenizer, "input": given.input, "split": given.split}
    made |= prepare(documents, tokenizer, Path(given.output), eod=given.eod, made=made)
    log.info("wrote %s.bin and .idx: %s documents, %s tokens", given.output, f"{made['documents']:,}",
             f"{made['tokens']:,}")  # fmt: skip
    return 0


def prepare(
    documents: Iterator[str], tokenizer: Any, prefix: Path, *, eod: str | None = None,
    made: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes an indexed dataset, with megatron-core's own builder; nothing half-written keeps its name.

    Args:
        documents: texts; each becomes one document, with the end-of-document token behind it.
        eod: that token's text, where it is not the one that calibration separates documents with.
        made: what else to note in PREFIX.json.

    Returns:
        The content of PREFIX.json: documents, tokens, vocabulary (a fingerprint), and `made`.

    Raises:
        UserError: the files are there, cannot be written, there is no text, or no such token.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    end = _end_of_document(tokenizer, eod)
    final = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", SIDECAR)]
    for path in final:
        if path.exists():
            raise UserError(f"{path} exists; give another --output")
    aside = [path.with_name(f".{path.name}.partial") for path in final]
    count = tokens = 0
    builder = None
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        builder = IndexedDatasetBuilder(str(aside[0]), dtype=DType.optimal_dtype(len(tokenizer)))
        while texts := list(islice(documents, AT_ONCE)):
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                builder.add_document(torch.tensor([*ids, end]), [len(ids) + 1])
                count, tokens = count + 1, tokens + len(ids) + 1
        if not count:
            raise UserError("the input holds no text")
        builder.finalize(str(aside[1]))
        note = {"documents": count, "tokens": tokens, "eod": end,
                "vocabulary": vocabulary_fingerprint(tokenizer), **(made or {})}  # fmt: skip
        aside[2].write_text(json.dumps(note, indent=1) + "\n")
        for part, path in zip(aside, final, strict=True):
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {prefix}: {error}") from error
    finally:
        if builder is not None:
            builder.data_file.close()
        for part in aside:
            part.unlink(missing_ok=True)
    return note


def _end_of_document(tokenizer: Any, eod: str | None) -> int:
    if eod is not None:
        number = tokenizer.get_vocab().get(eod)
        if number is None:
            raise UserError(f"--eod {eod!r} is no token of the tokenizer")
        return number
    return end_of_text_id(tokenizer)
