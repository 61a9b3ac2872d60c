"""Turns documents into full sequences of token ids, the same ones on every rank and every run.

No padding: documents are joined with the end-of-text id between them and cut every ``seq_length``
tokens, as in pre-training, so that no statistic sees a made-up position.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbridge_prune.blends import blend, mixed
from mbridge_prune.calibration.text import TOKEN_SUFFIXES, read_documents
from mbridge_prune.errors import UserError

DOCUMENT_SEPARATOR = "<|endoftext|>"
SHUFFLE_BUFFER = 1024  # documents held while shuffling, so that endless streams work too
TOKENIZER_BATCH = 32


def calibration_tokens(
    source: str | Path,
    tokenizer: Any,
    num_samples: int,
    seq_length: int,
    *,
    split: str = "train",
    text_key: str = "text",
    chat_template: bool = False,
    eod_id: int | None = None,
    add_bos: bool = False,
    seed: int = 1234,
    vocab_size: int | None = None,
) -> torch.LongTensor:
    """Return ``[num_samples, seq_length]`` int64 ids from a text source or a ready token file.

    Args:
        source: a token file (.npy, .safetensors; see ``load_tokens``) or what ``read_documents``
            takes; ``split``, ``text_key`` and ``chat_template`` are passed on to it. Several with
            commas between, as equal shares of the samples or as ``0.7,a.jsonl,0.3,b.jsonl``, are
            mixed sample by sample.
        vocab_size: rows of the model's embedding; when given, every id must be below it.

    The other arguments are those of ``pack``.

    Raises:
        UserError: for a source that cannot be read, is too short, or does not fit the model.
    """
    sources, weights = sources_of(source)
    if len(sources) > 1:
        order = mixed(num_samples, weights or [1.0] * len(sources), seed)
        tokens_ns = torch.empty(num_samples, seq_length, dtype=torch.long)
        for number, each in enumerate(sources):
            places = [place for place, of in enumerate(order) if of == number]
            if not places:
                raise UserError(f"num_samples={num_samples} leaves none of {each}: give more samples")
            tokens_ns[places] = calibration_tokens(
                each, tokenizer, len(places), seq_length, split=split, text_key=text_key,
                chat_template=chat_template, eod_id=eod_id, add_bos=add_bos, seed=seed, vocab_size=vocab_size,
            )  # fmt: skip
        return tokens_ns
    source = sources[0]
    if Path(source).suffix in TOKEN_SUFFIXES:
        return load_tokens(source, num_samples=num_samples, seq_length=seq_length, vocab_size=vocab_size)
    documents = read_documents(
        source, split=split, text_key=text_key, chat_template=chat_template, tokenizer=tokenizer
    )
    tokens = pack(
        documents,
        tokenizer,
        num_samples=num_samples,
        seq_length=seq_length,
        eod_id=eod_id,
        add_bos=add_bos,
        seed=seed,
    )
    _check_range(tokens, vocab_size, f"the tokenizer's output for {source}")
    return tokens


def sources_of(source: str | Path) -> tuple[list[str], list[float] | None]:
    """The sources of a mixture, and their weights where they have some; a path that exists is one source.

    Raises:
        UserError: the list is neither ``a,b`` nor ``weight,a,weight,b``.
    """
    # os.path answers no where a list is too long for a file name.
    if "," not in str(source) or os.path.exists(os.path.expanduser(source)):
        return [str(source)], None
    return blend([word.strip() for word in str(source).split(",")], "source")


def pack(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    num_samples: int,
    seq_length: int,
    eod_id: int | None = None,
    add_bos: bool = False,
    seed: int = 1234,
) -> torch.LongTensor:
    """Return ``[num_samples, seq_length]`` int64 ids: shuffled documents, joined and cut.

    Args:
        documents: texts; only as many are read as needed, plus a buffer for the shuffle.
        tokenizer: a Hugging Face tokenizer; its own automatic special tokens are left out.
        eod_id: the id between documents; ``end_of_text_id(tokenizer)`` when None.
        add_bos: begin every sequence with the tokenizer's BOS (models trained with one can be
            useless without: their first position is an attention sink).
        seed: of the document order.

    Raises:
        UserError: when the documents give too few sequences, or the tokenizer has no BOS.
    """
    _check_positive(num_samples=num_samples, seq_length=seq_length)
    eod_id = end_of_text_id(tokenizer) if eod_id is None else eod_id
    head = [_bos_id(tokenizer)] if add_bos else []
    body = seq_length - len(head)
    if body < 1:
        raise UserError(f"seq_length={seq_length} leaves no room for text beside the BOS")
    needed = num_samples * body
    ids: list[int] = []
    shuffled = _shuffle(iter(documents), seed)
    while len(ids) < needed and (batch := list(islice(shuffled, TOKENIZER_BATCH))):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for document_ids in encoded["input_ids"]:
            ids += document_ids
            ids.append(eod_id)
    if len(ids) < needed:
        raise UserError(
            f"the text gives {len(ids) // body} sequences of {seq_length} tokens ({len(ids)} "
            f"tokens), {num_samples} were asked for; give more text, or lower num_samples or "
            "seq_length"
        )
    text_nb = torch.tensor(ids[:needed], dtype=torch.long).view(num_samples, body)
    head_nh = torch.tensor(head, dtype=torch.long).expand(num_samples, len(head))
    return torch.cat([head_nh, text_nb], dim=1)


def load_tokens(
    path: str | Path,
    *,
    num_samples: int | None = None,
    seq_length: int | None = None,
    vocab_size: int | None = None,
) -> torch.LongTensor:
    """Return the ``[samples, seq_length]`` int64 ids of a ready token file.

    Args:
        path: a .npy, or a .safetensors with one tensor; integers, ``[tokens]`` (cut into
            sequences of ``seq_length``) or ``[samples, seq_length]``.
        num_samples: take the first so many; all when None.
        seq_length: required for one dimension, checked for two.
        vocab_size: rows of the model's embedding; when given, every id must be below it.

    Raises:
        UserError: for a file that is missing, broken, of another kind or shape, or too short.
    """
    tokens = _read_token_file(Path(path).expanduser())
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise UserError(f"{path} holds {tokens.dtype}, expected integer token ids")
    if tokens.dim() == 1 and seq_length is not None:
        _check_positive(seq_length=seq_length)
        tokens = tokens[: len(tokens) // seq_length * seq_length].view(-1, seq_length)
    if tokens.dim() != 2:
        raise UserError(
            f"{path} has shape {list(tokens.shape)}, expected [samples, seq_length], or [tokens] "
            "with a seq_length"
        )
    samples, width = tokens.shape
    if seq_length not in (None, width):
        raise UserError(f"{path} holds sequences of {width} tokens: set seq_length={width}")
    if samples == 0 or samples < (num_samples or 1):
        raise UserError(
            f"{path} gives {samples} sequences of {width} tokens, {num_samples or 1} were asked "
            "for; lower num_samples or give a longer file"
        )
    tokens = tokens[:num_samples].long()
    _check_range(tokens, vocab_size, str(path))
    return tokens


def token_fingerprint(tokens: torch.Tensor) -> str:
    """Return 16 hex digits of the SHA-256 over the shape and the ids, whatever their dtype."""
    ids = np.ascontiguousarray(tokens.detach().cpu().numpy().astype("<i8"))
    digest = hashlib.sha256(repr(list(ids.shape)).encode())
    digest.update(ids.tobytes())
    return digest.hexdigest()[:16]


def end_of_text_id(tokenizer: Any) -> int:
    """Return the id that separates documents in packed text.

    ``<|endoftext|>`` where that is a special token of the tokenizer (a chat model's EOS ends a
    turn, not a document), else the EOS.

    Raises:
        UserError: when the tokenizer has neither.
    """
    if DOCUMENT_SEPARATOR in tokenizer.all_special_tokens:
        return tokenizer.convert_tokens_to_ids(DOCUMENT_SEPARATOR)
    added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
    if DOCUMENT_SEPARATOR in added:
        return added[DOCUMENT_SEPARATOR]
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-text token; give eod_id")
    return tokenizer.eos_token_id


def _shuffle(documents: Iterator[str], seed: int) -> Iterator[str]:
    """Shuffle within a bounded buffer: each step yields a random one of the buffered documents."""
    generator = random.Random(seed)
    buffer = list(islice(documents, SHUFFLE_BUFFER))
    while buffer:
        at = generator.randrange(len(buffer))
        yield buffer[at]
        following = next(documents, None)
        if following is None:
            buffer[at] = buffer[-1]
            buffer.pop()
        else:
            buffer[at] = following


def _bos_id(tokenizer: Any) -> int:
    if tokenizer.bos_token_id is None:
        raise UserError("add_bos=True, but the tokenizer has no BOS token; set add_bos=False")
    return tokenizer.bos_token_id


def _read_token_file(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if path.suffix == ".npy":
        try:
            ids = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {path} as a NumPy array: {error}") from error
        if ids.dtype.kind not in "iu":
            raise UserError(f"{path} holds {ids.dtype}, expected integer token ids")
        return torch.from_numpy(ids.astype(np.int64))
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is not one of {', '.join(TOKEN_SUFFIXES)}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} as safetensors: {error}") from error
    if len(tensors) != 1:
        raise UserError(f"{path} holds {len(tensors)} tensors ({', '.join(tensors)}), expected one")
    return next(iter(tensors.values()))


def _check_range(tokens: torch.Tensor, vocab_size: int | None, what: str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "0 or more" if vocab_size is None else f"from 0 to {vocab_size - 1} (vocab_size)"
        raise UserError(
            f"{what} holds ids from {low} to {high}, expected {limit}; it was made with another "
            "tokenizer than the model's"
        )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name}={value}, expected at least 1")
