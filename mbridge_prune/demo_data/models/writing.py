"""What the converters share: rotary layouts, a Llama folder, a fast tokenizer.

Rotary layouts differ: transformers rotates the two halves of a head, the other formats adjacent pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a [heads * head_dim, in] projection from rotary pairs to halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def save_llama(folder: Path, weights: dict[str, np.ndarray], **config: Any) -> None:
    """Write a tied Llama; ``weights`` are keyed by names without ``model.`` and ``.weight``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **config)).float()
    state = {
        f"model.{name}.weight": torch.tensor(np.array(value, dtype=np.float32))
        for name, value in weights.items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    model.save_pretrained(folder)


def fast_tokenizer(backend: Any, max_length: int, **special: Any) -> Any:
    """A Hugging Face tokenizer around a `tokenizers` one; `special` are its special tokens by role."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
