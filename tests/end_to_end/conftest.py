"""One tiny model with a tokenizer, a text, and the command run inside this process."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Said
from models import VOCAB, tokens, write_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (tokenizer and generation config included), `text.txt` and `tokens.npy`."""
    root = tmp_path_factory.mktemp("user")
    write_hf("llama_tied", root / "model", seed=3)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(root / "model")
    (root / "model" / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 5, "bos_token_id": 1, "eos_token_id": 2})
    )
    text = "\n\n".join(" ".join(f"w{i}" for i in row) for row in tokens(20).tolist())
    (root / "text.txt").write_text(text)
    np.save(root / "tokens.npy", tokens(8).numpy())
    return root


@pytest.fixture
def base(site: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run that works; later ones win."""
    return [
        "--hf-path", f"{site}/model", "--calib-data", f"{site}/tokens.npy", "--seq-length", "12",
        "--calib-num-samples", "8", "--calib-batch-size", "2", "--output", f"{tmp_path}/run",
        "--prune-export-config", '{"ffn_hidden_size": 64}',
    ]  # fmt: skip


def snapshot(*folders: Path) -> dict[str, str]:
    """Every path below the folders, with a hash of each file."""
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for folder in folders
        for p in sorted(folder.rglob("*"))
    }


def refused(said: Said) -> str:
    """The one line of a refused request."""
    assert said.code == 2, said
    assert len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("error: "), said.err
    assert "Traceback" not in said.out
    return said.err


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def plan_of(run_folder: Path) -> dict[str, Any]:
    return json.loads((run_folder / "plan.json").read_text())
