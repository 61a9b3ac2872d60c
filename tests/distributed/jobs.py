"""Prunes, exports and runs the models of a JSON list of jobs, at the layout of this process's world.

    torchrun --nproc-per-node 2 tests/distributed/jobs.py jobs.json

Each job leaves `hf/`, `result.json` and `logits-<dp rank>.pt` (and `megatron/`) in its folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import mbridge_prune as mbp
from mbridge_prune import cli, runtime
from mbridge_prune.bridge.megatron import save_megatron
from mbridge_prune.calibration.schedule import forward_only


def load(job: dict[str, Any]) -> Any:
    overrides = {"seq_length": 12, "pipeline_model_parallel_size": job["pp"], **job.get("overrides", {})}
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=job["model"], provider_overrides=overrides, moe_grouped_gemm=False
    )


def work(job: dict[str, Any]) -> mbp.Plan:
    out = Path(job["out"])
    bridge, provider, model, unwrapped, tokenizer = load(job)
    loop = None
    if job["score"]:
        loop = mbp.get_hf_mbridge_calibration_loop(
            model=model, provider=provider, tokenizer=tokenizer, hf_model_name_or_path=job["model"],
            dataset_name=job["tokens"], num_samples=8, micro_batch_size=job.get("micro_batch", 2),
        )  # fmt: skip
    _, plan = mbp.prune(
        unwrapped, mode="mcore_minitron", constraints={"export_config": job["sizes"]},
        config={"forward_loop": loop, "checkpoint": job["scores"]},
    )  # fmt: skip
    mbp.export_hf(bridge, model, out / "hf", layers_kept=plan.layers_kept, sizes=plan.sizes_after)
    if job.get("megatron"):
        save_megatron(bridge, model, out / "megatron")
    logits: list[torch.Tensor] = []
    tokens_ns = mbp.CalibrationLoop(torch.load(job["prompts"])).tokens_ns
    forward_only(unwrapped, tokens_ns, 1, with_logits=True, consume=lambda out, _: logits.append(out.clone()))
    if logits:
        torch.save(torch.cat(logits), out / f"logits-{runtime.place('dp')}.pt")
    layers = runtime.gather_objects(len(unwrapped.decoder.layers), "pp")
    if runtime.rank() == 0:
        (out / "result.json").write_text(json.dumps({"plan": plan.to_dict(), "stages": layers}))
    return plan


def main(arguments: list[str]) -> int:
    for job in json.loads(Path(arguments[0]).read_text()):
        work(job)
    runtime.barrier()
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
