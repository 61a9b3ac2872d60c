"""glassllm 0.85M from its NumPy archive: the smallest real model."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.demo_data.models.writing import fast_tokenizer, halves, save_llama

GLASSLLM = pip_archive(
    "glassllm-0.1.0-py3-none-any.whl",
    "glassllm==0.1.0",
    "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
)


def glassllm() -> Path:
    """The English 0.85M model of glassllm (MIT): 4 layers, 4 heads / 2 KV, FFN 341, tied; fp32."""
    return build_once("glassllm-0.85m", _build_glassllm)


def _build_glassllm(folder: Path) -> None:
    with zipfile.ZipFile(fetch(GLASSLLM)) as wheel:
        arrays = np.load(io.BytesIO(wheel.read("glassllm/weights/en.npz")), allow_pickle=False)
        vocabulary = json.loads(wheel.read("glassllm/weights/en.tokenizer.json"))
    shape = json.loads(str(arrays["__config__"]))
    heads, kv_heads, layers = shape["n_heads"], shape["n_kv_heads"], shape["n_layers"]
    weights = {"embed_tokens": arrays["E"], "norm": arrays["norm_f.gamma"]}
    for i in range(layers):
        block = {key: arrays[f"blocks.{i}.{key}"] for key in _GLASSLLM_NAMES}
        block["attn.W_Q"] = halves(block["attn.W_Q"].T, heads).T
        block["attn.W_K"] = halves(block["attn.W_K"].T, kv_heads).T
        for key, name in _GLASSLLM_NAMES.items():
            weights[f"layers.{i}.{name}"] = block[key].T
    save_llama(
        folder,
        weights,
        hidden_size=shape["d_model"],
        intermediate_size=arrays["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=shape["max_len"],
        rope_theta=shape["rope_base"],
        rms_norm_eps=shape["eps"],
        vocab_size=shape["vocab_size"],
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    _glassllm_tokenizer(vocabulary, shape["max_len"]).save_pretrained(folder)


_GLASSLLM_NAMES = {
    "norm1.gamma": "input_layernorm",
    "attn.W_Q": "self_attn.q_proj",
    "attn.W_K": "self_attn.k_proj",
    "attn.W_V": "self_attn.v_proj",
    "attn.W_O": "self_attn.o_proj",
    "norm2.gamma": "post_attention_layernorm",
    "ffn.W1": "mlp.gate_proj",
    "ffn.W3": "mlp.up_proj",
    "ffn.W2": "mlp.down_proj",
}


def _glassllm_tokenizer(vocabulary: dict[str, Any], max_length: int) -> Any:
    """Character BPE over NFC text with ``▁`` for a space; unknown characters become <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(pair) for pair in vocabulary["merges"]]
    tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *vocabulary["alphabet"]]
    tokens += [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    roles = {f"{role}_token": f"<{role}>" for role in ("pad", "unk", "bos", "eos")}
    return fast_tokenizer(backend, max_length, **roles)
