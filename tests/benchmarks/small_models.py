"""Models small enough to measure every candidate of their space, with text of their own.

Two are trained here, on bytes of enwik8, a few minutes each; two are real and speak: their text is what
they write themselves, since what they were trained on is in no package. All is kept in the cache folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import hf_config

from mbridge_prune import demo_data

LENGTH = 128
HELD_OUT, TEST = 16, 32
"""Sequences that a search measures on, and those that tell the true loss."""
CALIBRATION = 32
BYTES = {"vocab_size": 256, "max_position_embeddings": LENGTH, "tie_word_embeddings": True}
STEPS, BATCH, RATE = 300, 16, 3e-3


@dataclass
class Small:
    """A model and three texts that have nothing in common, [sequences, tokens] int64 each.

    Args:
        space: divisors, and the keys of `prune(config=...)` that bound its choices.
    """

    path: Path
    calibration_ns: torch.Tensor
    held_out_ns: torch.Tensor
    test_ns: torch.Tensor
    space: dict[str, Any] = field(default_factory=dict)


def wiki(seed: int) -> Small:
    """Llama of 6 layers, hidden 96, FFN 256, 6 heads in 3 groups, trained on bytes of Wikipedia; 280 candidates."""
    shape = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 3,
             "num_hidden_layers": 6}  # fmt: skip
    steps = {"hidden_size_divisor": 8, "ffn_hidden_size_divisor": 32, "num_layers_divisor": 1}
    return _trained("wiki", "llama", shape, seed, steps)


def wiki_fine(seed: int) -> Small:
    """The same model, in finer steps: 952 candidates."""
    small = wiki(seed)
    small.space["ffn_hidden_size_divisor"] = 8
    return small


def wiki_finest(seed: int) -> Small:
    """The same model, in the finest steps: 13,000 candidates."""
    small = wiki(seed)
    small.space |= {"hidden_size_divisor": 2, "ffn_hidden_size_divisor": 2}
    return small


def experts(seed: int) -> Small:
    """Qwen3-MoE of 4 layers, hidden 96, 8 experts of 64 channels, top-2; on the same text."""
    shape = {"hidden_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
             "head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 4,
             "norm_topk_prob": True, "router_aux_loss_coef": 0.01, "output_router_logits": True}  # fmt: skip
    steps = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1,
             "num_moe_experts_divisor": 2}  # fmt: skip
    return _trained("experts", "qwen3_moe", shape, seed, steps)


def glassllm(seed: int) -> Small:
    """The real 0.85M model; seeds differ in their texts."""
    steps = {"hidden_size_divisor": 8, "ffn_hidden_size_divisor": 16, "num_layers_divisor": 1}
    return _real(demo_data.glassllm(), seed, steps)


def stories(seed: int) -> Small:
    """The real Stories15M; seeds differ in their texts."""
    steps = {"hidden_size_divisor": 32, "ffn_hidden_size_divisor": 128, "num_layers_divisor": 1}
    return _real(demo_data.stories15m(), seed, steps)


SMALL: dict[str, Callable[[int], Small]] = {
    "wiki": wiki, "wiki-fine": wiki_fine, "wiki-finest": wiki_finest, "experts": experts, "glassllm": glassllm, "stories": stories,
}  # fmt: skip


def work_folder() -> Path:
    """Where models, texts and measurements are kept."""
    folder = demo_data.cache_dir() / "whole-space"
    folder.mkdir(exist_ok=True)
    return folder


def _bytes_of(split: str, length: int = 4_000_000) -> torch.Tensor:
    """The bytes of a split's articles."""
    text = "\n\n".join(demo_data.enwik8_articles(split)).encode()[:length]
    return torch.from_numpy(np.frombuffer(text, dtype=np.uint8).copy()).long()


def _windows(stream: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """[count, LENGTH] at random places of a stream."""
    starts = torch.randint(len(stream) - LENGTH, (count,), generator=draw)
    return stream[starts[:, None] + torch.arange(LENGTH)]


def _trained(name: str, family: str, shape: dict[str, Any], seed: int, steps: dict[str, int]) -> Small:
    path = work_folder() / f"{name}-{seed}"
    train = _bytes_of("train")
    if not (path / "config.json").exists():
        _train(hf_config(family, **BYTES, **shape), train, seed).save_pretrained(path)
    draw = torch.Generator().manual_seed(1000 + seed)
    same = torch.Generator().manual_seed(0)
    return Small(
        path, _windows(train, CALIBRATION, draw), _windows(_bytes_of("validation"), HELD_OUT, draw),
        _windows(_bytes_of("test"), TEST, same), steps,
    )  # fmt: skip


def _train(config: Any, stream: torch.Tensor, seed: int) -> Any:
    """AdamW, cosine decay after a short warm-up."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        rate = RATE * min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens_bs = _windows(stream, BATCH, draw)
        loss = model(input_ids=tokens_bs, labels=tokens_bs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"trained: loss {loss.item():.3f} nats a byte after {STEPS} steps", flush=True)
    return model.eval()


def _real(path: Path, seed: int, steps: dict[str, int]) -> Small:
    draws = _written(path, 0, TEST), _written(path, 1 + seed, CALIBRATION + HELD_OUT)
    return Small(path, draws[1][:CALIBRATION], draws[1][CALIBRATION:], draws[0], steps)


def _written(path: Path, seed: int, count: int) -> torch.Tensor:
    """[count, LENGTH] that a model writes, drawn from its own distribution."""
    from transformers import AutoModelForCausalLM

    file = work_folder() / f"{path.name}-text-{seed}.npy"
    if not file.exists():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        torch.manual_seed(seed)
        begin = torch.full((count, 1), model.config.bos_token_id)
        written = model.generate(
            begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
            min_length=LENGTH, max_length=LENGTH, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        np.save(file, written.numpy())
    return torch.from_numpy(np.load(file))
