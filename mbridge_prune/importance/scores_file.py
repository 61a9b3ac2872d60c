"""The scores file: safetensors with JSON metadata, keyed by global layer number and hparam."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mbridge_prune.errors import UserError
from mbridge_prune.files import write_tensors
from mbridge_prune.importance.scores import Scores

FORMAT = "mbridge_prune scores 2"


def save_scores(scores: Scores, path: str | Path) -> None:
    """Writes the file on rank 0, aside first, then under its name."""
    metadata = {"format": FORMAT, "meta": json.dumps(scores.meta, sort_keys=True)}
    write_tensors(scores.units, Path(path), metadata, "the scores file")


def load_scores(path: str | Path, expect: dict[str, Any]) -> Scores:
    """Reads a scores file and refuses a foreign or stale one with the reason.

    Args:
        expect: metadata that must agree (`model`, `data`, `ranking`, ...); None values are not
            checked.

    Raises:
        UserError: not a scores file, broken, or taken from something else.
    """
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            units: dict[str, torch.Tensor] = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable scores file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a scores file of this version ({FORMAT!r} expected)")
    meta = json.loads(metadata["meta"])
    for key, value in expect.items():
        if value is not None and meta.get(key) is not None and meta[key] != value:
            raise UserError(
                f"{path} holds scores of another {key} ({meta[key]}, this run has {value}); "
                "give another path or delete the file to score anew"
            )
    return Scores(units, meta)
