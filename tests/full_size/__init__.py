"""Configs of published models at full size, without weights; what they count to is in `published`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemotron_h import copy_code

ROOT = Path(__file__).parent
NAMES = sorted(folder.name for folder in ROOT.iterdir() if (folder / "config.json").is_file())


def full_size_config(name: str) -> dict[str, Any]:
    return json.loads((ROOT / name / "config.json").read_text())


def write_full_size(name: str, path: Path) -> Path:
    """A folder that transformers reads: config.json, and beside it the remote code that it names."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name / "config.json", path / "config.json")
    if full_size_config(name)["model_type"] == "nemotron_h":
        copy_code(path)
    return path
