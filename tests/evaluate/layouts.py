"""Evaluates the models of a site at several layouts of this world; leaves `<layout>.pt`, every rank's results.

torchrun --nproc-per-node 2 tests/evaluate/layouts.py SITE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import questions
import torch
from transformers import AutoTokenizer

import mbridge_prune as mbp
from mbridge_prune import cli, runtime
from mbridge_prune.evaluate.divergence import Reference
from mbridge_prune.evaluate.loss import token_losses
from mbridge_prune.evaluate.mmlu import answer
from mbridge_prune.evaluate.mmlu_prompts import prompts
from mbridge_prune.evaluate.score_functions import score_function

sys.path.append(str(Path(__file__).parents[1]))
from commands import launched

DENSE = ("parent", "child")
SPARSE = ("experts", "experts")
LAYOUTS: dict[int, dict[str, tuple[dict[str, int], tuple[str, str]]]] = {
    1: {"single": ({}, DENSE), "experts": ({}, SPARSE)},
    2: {"pp2": ({"pipeline_model_parallel_size": 2}, DENSE), "dp2": ({}, DENSE),
        "tp2": ({"tensor_model_parallel_size": 2}, DENSE),
        "ep2": ({"expert_model_parallel_size": 2}, SPARSE)},
}  # fmt: skip


def load(folder: Path, layout: dict[str, int]) -> Any:
    uneven = {}
    if folder.name == "child" and layout.get("pipeline_model_parallel_size", 1) > 1:
        uneven = {"num_layers_in_first_pipeline_stage": 2}
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=folder, provider_overrides={"seq_length": 20, **layout, **uneven},
        moe_grouped_gemm=False,
    ).unwrapped_model  # fmt: skip


def evaluate(site: Path, layout: dict[str, int], names: tuple[str, str]) -> dict[str, Any]:
    """Results of this rank. Numbers of sequences and prompts divide by neither the ranks nor the batches."""
    ids_ns = torch.load(site / "ids.pt")
    full, child = (load(site / name, layout) for name in names)
    with torch.no_grad():
        if names == SPARSE:
            for p in child.parameters():
                p.mul_(1.02)
    tokenizer = AutoTokenizer.from_pretrained(site / "parent")
    ask = lambda shots: prompts(tokenizer, 0.6, shots, site / "mmlu", subjects=questions.SUBJECTS)
    reference = Reference.of(full, ids_ns, positions=31, batch=2)
    found: dict[str, Any] = {
        "losses": token_losses(child, ids_ns, 2), "losses one by one": token_losses(child, ids_ns),
        "kl": reference.kl(child), "kl of 3": reference.kl(child, samples=3),
        "kl undealt": reference.kl(child, deal=False),
        "mmlu": answer(child, ask(0), 3), "mmlu shared": answer(child, ask(2), 3),
        "mmlu whole": answer(child, ask(2), 3, share=False),
        "last stage": score_function("questions:stage")(child),
        "holds": None if reference.log_p is None else len(reference.log_p),
    }  # fmt: skip
    # Replicas of different models: each scores its own.
    own = (full, child)[runtime.place("dp")] if runtime.size("dp") == 2 and runtime.size("ep") == 1 else child
    found["own"] = {
        "losses": token_losses(own, ids_ns, 2, deal=False), "kl": reference.kl(own, deal=False),
        "mmlu": answer(own, ask(2), 3, deal=False),
    }  # fmt: skip
    return found


def command(site: Path) -> int:
    """launch/evaluate.py at as many stages as there are ranks; leaves `<ranks>.json`."""
    ranks = runtime.world_size()
    return launched("evaluate").main([
        "--hf-path", f"{site}/child", "--metrics", "loss,kl", "--reference-hf-path", f"{site}/parent",
        "--data", f"{site}/text.txt", "--window", "64", "--windows", "5", "--pp", f"{ranks}",
        "--output", f"{site}/{ranks}.json",
    ])  # fmt: skip


def main(arguments: list[str]) -> int:
    from megatron.core import parallel_state

    site = Path(arguments[0])
    for name, (layout, models) in LAYOUTS[runtime.world_size()].items():
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        results = runtime.gather_objects(evaluate(site, layout, models))
        if runtime.rank() == 0:
            torch.save(results, site / f"{name}.pt")
    parallel_state.destroy_model_parallel()
    return command(site)


if __name__ == "__main__":
    runtime.start_distributed()
    cli.leave(cli.run(main, sys.argv[1:]))
