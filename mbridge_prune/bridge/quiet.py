"""What Megatron, Megatron-Bridge and transformers say that would only disturb a user's log."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from mbridge_prune import runtime


@contextlib.contextmanager
def no_wrong_warning(folder: Path) -> Iterator[None]:
    """transformers 4.57 warns of Mistral's old pattern for every local tokenizer, whatever its model.

    It is true of Mistral's alone, and is said there.
    """
    try:
        kind = str(json.loads((folder / "config.json").read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        kind = "mistral"  # not known: let it speak
    speaks = any(word in kind for word in ("mistral", "ministral", "voxtral", "pixtral"))

    def told(record: logging.LogRecord) -> bool:
        return speaks or "fix_mistral_regex" not in record.getMessage()

    speaker = logging.getLogger("transformers.tokenization_utils_base")
    speaker.addFilter(told)
    try:
        yield
    finally:
        speaker.removeFilter(told)


@contextlib.contextmanager
def _no_counts() -> Iterator[None]:
    """Bridge prints every rank's number of parameters in the midst of the log, which tells the model's."""
    from megatron.bridge.models import model_provider

    printing = getattr(model_provider, "_print_num_params", None)
    if printing is None:
        yield
        return
    model_provider._print_num_params = lambda *_, **__: None
    try:
        yield
    finally:
        model_provider._print_num_params = printing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Megatron's notices about its own calls, and its counts of shards, out of the user's log."""
    names = ("megatron.bridge", "megatron.core")
    before = [logging.getLogger(name).level for name in names]
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open_null_on_other_ranks(), _no_counts():
            warnings.filterwarnings("ignore", module=r"megatron\..*")
            yield
    finally:
        for name, level in zip(names, before, strict=True):
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def open_null_on_other_ranks() -> Iterator[None]:
    """Rank 0 speaks: what Megatron prints elsewhere is dropped."""
    if runtime.rank() == 0:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()):
        yield
