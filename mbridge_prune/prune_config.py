"""The settings of the LLM mode: the keys of `prune(config=...)` and the steps of sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.calibration.loop import CalibrationLoop
from mbridge_prune.errors import UserError, nearest

RANKINGS = ("minitron", "weighted")
GREEDY = ("greedy", "greedy_logits")
DEPTHS = ("cosine", *GREEDY)
EXPERTS = ("gated", "gate_free")
REPAIRS = ("auto", "none", "norm", "least_squares", "sequential")
SCORES = ("kl", "loss")
"""Scores that need nothing but held-out text."""
HPARAMS = (
    "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "mamba_num_heads",
    "mamba_head_dim", "num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "num_layers",
)  # fmt: skip
"""Every dimension that can be pruned, in one model or another."""
DIVISORS = {
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "mamba_head_dim": 8,
    "num_moe_experts": 8,
    "num_layers": 2,
}
"""Default granularity of the search space; a manual export_config may be finer."""


def get_mcore_minitron_config(**divisors: int) -> dict[str, int]:
    """Search-space config: the step of each hparam's choices.

    Args:
        **divisors: `hidden_size_divisor` (256), `ffn_hidden_size_divisor` (512),
            `mamba_head_dim_divisor` (8), `num_moe_experts_divisor` (8), `num_layers_divisor` (2).

    Returns:
        `<hparam>_divisor` -> step; sizes given by hand must be multiples of it (or the full size).
    """
    config = {f"{name}_divisor": step for name, step in DIVISORS.items()}
    for key, step in divisors.items():
        if key not in config:
            raise UserError(f"unknown divisor {key!r}{nearest(key, config)}; known: {', '.join(config)}")
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            raise UserError(f"{key}={step!r} is not a positive integer")
        config[key] = step
    return config


@dataclass(kw_only=True)
class PruneConfig:
    """The keys of `prune(config=...)`."""

    forward_loop: Callable[[nn.Module], Any] | None = None
    """Runs the model on calibration data, the same each time: it is called for the scores and again for every
    repair. Any number of the model's calls, any batch size."""
    checkpoint: str | Path | None = None
    """Scores file: read if it exists (no forward pass is run), written otherwise."""
    importance: str = "weighted"
    """How units are ranked."""
    depth: str = "cosine"
    """How layers are ranked: "cosine" in one shot, or by removal on the calibration text: "greedy" by KL,
    "greedy_logits" by the error of the logits."""
    experts: str = "gated"
    """How routed experts are ranked: by the norm of their output times the router probability, or without."""
    repair: str = "auto"
    """What is done to the weights with the cut; "auto": least_squares with a forward loop, else none."""
    repair_memory_gb: float = 8.0
    """Memory of the sums that least squares is fitted on; more passes are made where they do not fit."""
    repair_offload: bool = False
    """Keep them in host memory; it takes longer."""
    skip_sorting: bool = False
    """The weights already stand in descending importance: cut without scores."""
    pad_token_id: int | None = None
    """Input positions with this token count in no statistic."""
    score_func: Callable[[nn.Module], float] | str = "kl"
    """Search: the score to maximise, f(model) -> float, or "kl" or "loss" on held-out text."""
    held_out: torch.Tensor | None = None
    """Search: [samples, sequence] tokens that calibration has not seen (default: the loop's)."""
    max_width_pruning: float = 0.4
    """Search: the largest share of a width that may go."""
    max_depth_pruning: float = 0.2
    """Search: the largest share of the layers that may go."""
    hparams_to_skip: Sequence[str] = ()
    """Search: hparams that keep their size."""
    search_space: Mapping[str, Mapping[str, int]] | None = None
    """Search: hparam -> {"min": n, "max": n}, in place of the shares."""
    candidate_filter: Callable[[dict[str, int]], bool] | None = None
    """Search: False for sizes (of every hparam) that are not wanted."""
    top_k: int = 10
    """Search: candidates that get the score."""
    score_lower_bound: float | None = None
    """Search: cut nothing if the best score is below it."""
    candidates: str | Path | None = None
    """Search: its log, read by a resumed one (default: candidates.jsonl beside the checkpoint)."""
    serving: Mapping[str, Any] | None = None
    """Search: batch_size (1), seq_length (4096), kv_dtype ("bfloat16") that memory and flops are for."""
    export_top_k: int = 0
    """Search: the best candidates that `export_candidate` is called for."""
    export_candidate: Callable[[int, nn.Module, dict[str, int], list[int]], Any] | None = None
    """Search: f(place, model, sizes, layers kept), with the model in that candidate's shapes."""

    def __post_init__(self) -> None:
        choices_of = {"importance": RANKINGS, "depth": DEPTHS, "experts": EXPERTS, "repair": REPAIRS}
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"{name}={value!r} is no choice{nearest(value, choices)}; choices: {', '.join(choices)}"
                )
        if self.repair_memory_gb <= 0:
            raise UserError(f"repair_memory_gb={self.repair_memory_gb!r} must be above 0")
        if self.forward_loop is not None and not callable(self.forward_loop):
            raise UserError(f"forward_loop is {type(self.forward_loop).__name__}, not callable")
        if not callable(self.score_func) and self.score_func not in SCORES:
            raise UserError(
                f"score_func={self.score_func!r} is no function of a model"
                f"{nearest(self.score_func, SCORES)}; names: {', '.join(SCORES)}; MMLU and module:function: "
                "give mbridge_prune.evaluate.score_functions.score_function(name, tokenizer=..., data=...)"
            )
        for name in ("max_width_pruning", "max_depth_pruning"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise UserError(f"{name}={value!r} is no share: give 0 to below 1, such as 0.4")
        for name, least in (("top_k", 1), ("export_top_k", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} must be an integer of at least {least}")

    def repair_made(self) -> str:
        """The repair, "auto" resolved: least squares where there is text to fit on, else none.

        Raises:
            UserError: one that was asked for and cannot be made: nothing to measure on, or padded text.
        """
        if self.repair == "auto":
            return "none" if self.forward_loop is None or self.pad_token_id is not None else "least_squares"
        if self.repair == "none":
            return "none"
        if self.forward_loop is None:
            raise UserError(f"repair={self.repair!r} runs the model on text: config needs a forward_loop")
        if self.pad_token_id is not None:
            raise UserError(f"repair={self.repair!r} takes full sequences, not padded ones (pad_token_id)")
        return self.repair

    def check_greedy(self) -> None:
        """Refuses greedy depth where predictions cannot be compared.

        Raises:
            UserError: no text of our own loop, or a vocabulary that is spread over ranks.
        """
        if self.forward_loop is not None and not isinstance(self.forward_loop, CalibrationLoop):
            raise UserError(
                f"depth={self.depth!r} needs the tokens themselves: a forward_loop of "
                "get_hf_mbridge_calibration_loop(...) or CalibrationLoop(tokens), or depth='cosine'"
            )
        if runtime.size("tp") > 1:
            raise UserError(f"depth={self.depth!r} compares predictions: use --tp 1, or depth='cosine'")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PruneConfig:
        """From a plain dict; an unknown key is refused with the nearest right one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in config:
            if key not in names:
                raise UserError(f"unknown config key {key!r}{nearest(key, names)}; keys: {', '.join(names)}")
        return cls(**config)
