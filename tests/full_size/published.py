"""What the makers say these models count to, and what transformers' own classes count to, exactly.

`exact` and `exact_active` were counted on the meta device by transformers' class of the architecture, or by
the reference in tests/nemotron_h, with no line of this project's code and none of Megatron's
(`test_published.py` counts again). Buffers, such as the router's correction bias, count in neither.
`exact_active` leaves out the experts that a token does not visit, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One model.

    Args:
        total: published size in billions, in the digits it was published in.
        source: who says so, in words.
        exact: parameters; a multi-token prediction module does not count.
        active: published parameters that a token uses, in billions.
        exact_active: parameters without idle experts, both embeddings included.
        without_embedding: the published active count leaves the input embedding out.
        slack: how far `active` lies from the exact count for another reason, in billions.
    """

    total: str
    source: str
    exact: int
    active: str | None = None
    exact_active: int | None = None
    without_embedding: bool = False
    slack: float = 0.0


PUBLISHED = {
    "llama-3.1-8b": Published("8.03", "hub page, number of safetensors parameters: 8.03B", 8_030_261_248),
    "qwen3-8b": Published("8.2", "model card: 8.2B parameters, 6.95B non-embedding", 8_190_735_360),
    "qwen3-30b-a3b": Published(
        "30.5", "model card: 30.5B in total, 3.3B activated (3.35B, cut off, not rounded)", 30_532_122_624,
        "3.3", 3_353_032_704, slack=0.05,
    ),
    "nemotron-h-8b": Published(
        "8", "model card and arXiv 2504.03624: Nemotron-H-8B; sizes of its table", 8_100_852_736
    ),
    "nemotron-nano-9b-v2": Published(
        "8.89", "arXiv 2508.14444: 8.89B parameters; model card: 9B", 8_888_227_328
    ),
    "nemotron-3-nano-30b-a3b": Published(
        "31.6", "technical report: 31.6B in total, 3.2B active (3.6B including embeddings)", 31_577_937_344,
        "3.2", 3_580_073_408, without_embedding=True,
    ),
    "deepseek-v3": Published(
        "671", "README and arXiv 2412.19437: 671B in total, 37B activated for a token", 671_026_404_352,
        "37", 37_552_282_624, without_embedding=True,
    ),
    "gpt-oss-20b": Published(
        "20.9", "model card (arXiv 2508.10925): 20.9B in total, 3.61B active, without the input embedding",
        20_914_757_184, "3.61", 4_187_440_704, without_embedding=True,
    ),
    "gemma-3-1b": Published(
        "1.0", "arXiv 2503.19786, table of sizes: 302M embedding and 698M other parameters", 999_885_952
    ),
    "gemma-3-27b-text": Published(
        "27.0", "arXiv 2503.19786, table of sizes: 25,600M parameters beside 1,416M of embedding", 27_009_346_304
    ),
}  # fmt: skip
