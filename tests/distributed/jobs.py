"""Does the jobs of a JSON list, each at its own parallel layout of this process's world.

    torchrun --nproc-per-node 2 tests/distributed/jobs.py jobs.json

A job's `kind` is a function of this file; its `pp`, `tp` and `ep` are 1 where they are not given.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mbridge_prune as mbp
from mbridge_prune import cli, mcore, runtime
from mbridge_prune.bridge.megatron import save_megatron
from mbridge_prune.calibration.schedule import forward_only
from mbridge_prune.dynamic import DEPTH, select, shrink, sort
from mbridge_prune.importance import load_scores
from mbridge_prune.mcore_minitron import table_of

Job = dict[str, Any]


def load(job: Job) -> Any:
    take_groups(job)
    return mbp.load_mbridge_model_from_hf(
        hf_model_name_or_path=job["model"], provider_overrides=layout_of(job),
        moe_grouped_gemm=job.get("grouped", False), trust_remote_code=job.get("trust", False),
    )  # fmt: skip


def layout_of(job: Job) -> dict[str, Any]:
    """The provider overrides of a job."""
    return {
        "seq_length": 12, "pipeline_model_parallel_size": job.get("pp", 1),
        "tensor_model_parallel_size": job.get("tp", 1), "expert_model_parallel_size": job.get("ep", 1),
        **job.get("overrides", {}),
    }  # fmt: skip


def take_groups(job: Job) -> None:
    """Gives up the process groups of the job before, where this one has another layout."""
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        if any(runtime.size(kind) != job.get(kind, 1) for kind in ("pp", "tp", "ep")):
            parallel_state.destroy_model_parallel()


def work(job: Job) -> mbp.Plan:
    """Prunes and exports: leaves `hf/`, `result.json` and `logits-<dp rank>.pt` (and `megatron/`)."""
    out, loaded = Path(job["out"]), load(job)
    bridge, _, model, unwrapped, _ = loaded
    _, plan = mbp.prune(
        unwrapped, mode="mcore_minitron", constraints={"export_config": job["sizes"]}, config=settings(job, loaded)
    )  # fmt: skip
    mbp.export_hf(
        bridge, model, out / "hf", layers_kept=plan.layers_kept, sizes=plan.sizes_after,
        trust_remote_code=job.get("trust", False), source=job["model"],
    )  # fmt: skip
    if job.get("megatron"):
        save_megatron(bridge, model, out / "megatron", hf_folder=out / "hf")
    save_logits(unwrapped, job)
    layers = runtime.gather_objects(len(mcore.language_model(unwrapped).decoder.layers), "pp")
    say(job, plan=plan.to_dict(), stages=layers)
    return plan


def score(job: Job) -> None:
    """Leaves the scores file."""
    loaded = load(job)
    mbp.score(loaded.unwrapped_model, settings(job, loaded))


def refused(job: Job) -> None:
    """Leaves in `result.json` what the job `asks` for was refused with, on every rank."""
    try:
        KINDS[job["asks"]](job)
    except mbp.UserError as error:
        said = runtime.gather_objects(str(error))
        say(job, refused=said)


def candidate(job: Job) -> None:
    """Logits inside select() and after shrink(); in `result.json`, what select() did not give back."""
    model = load(job).unwrapped_model
    table, scores = table_of(model), load_scores(job["scores"], {})
    sort(table, scores.orders(table))
    sizes = table.settle(job["sizes"])
    layers = scores.layers_kept(sizes[DEPTH])
    save_logits(model, job, "full")
    before = contents(model)
    with select(table, sizes, layers):
        save_logits(model, job, "selected")
    after = contents(model)
    lost = [n for n in before.keys() | after.keys() if not same(before.get(n), after.get(n))]
    save_logits(model, job, "again")
    shrink(table, sizes, layers)
    save_logits(model, job)
    say(job, lost=runtime.gather_objects(lost), watched=len(before))


def contents(model: torch.nn.Module) -> dict[str, Any]:
    """Every tensor (a copy, and where it lies), every plain number of a module, and the configuration."""
    found: dict[str, Any] = {f"config.{n}": v for n, v in vars(model.config).items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name], found[f"{name} at"] = tensor.detach().clone(), tensor.data_ptr()
    for name, module in model.named_modules():
        found |= {f"{name}.{n}": v for n, v in vars(module).items() if isinstance(v, (int, str, list, tuple))}
    return found


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def reload(job: Job) -> None:
    """Logits of the model in a Megatron checkpoint, at this job's layout."""
    take_groups(job)
    save_logits(reloaded(job), job)


def reloaded(job: Job) -> torch.nn.Module:
    """The model of the checkpoint `job["megatron"]`, built from what lies beside it alone."""
    return mbp.load_mbridge_model_from_megatron(
        megatron_path=job["megatron"], provider_overrides=layout_of(job),
        moe_grouped_gemm=job.get("grouped", False), trust_remote_code=job.get("trust", False),
    ).unwrapped_model  # fmt: skip


def export(job: Job) -> None:
    """launch/export.py of the checkpoint `job["megatron"]`, at this job's layout: leaves `hf/`."""
    take_groups(job)
    words = ["--megatron-path", job["megatron"], "--output", f"{job['out']}/hf"]
    command = runpy.run_path(str(Path(__file__).parents[2] / "launch" / "export.py"))["main"]
    command([*words, "--pp", str(job["pp"]), "--tp", str(job.get("tp", 1))])


def settings(job: Job, loaded: Any) -> dict[str, Any]:
    loop = None
    if job["score"]:
        loop = mbp.get_hf_mbridge_calibration_loop(
            model=loaded.model, provider=loaded.provider, tokenizer=loaded.tokenizer,
            hf_model_name_or_path=job["model"], dataset_name=job["tokens"], num_samples=job.get("samples", 8),
            micro_batch_size=job.get("micro_batch", 2),
        )  # fmt: skip
    plain = {"importance": "minitron", "repair": "none"}
    return {**plain, "forward_loop": loop, "checkpoint": job["scores"], **job.get("prune", {})}


def save_logits(model: torch.nn.Module, job: Job, name: str = "logits") -> None:
    """[prompts of this data-parallel rank, s, vocab], on the last pipeline stage."""
    logits: list[torch.Tensor] = []
    tokens_ns = mbp.CalibrationLoop(torch.load(job["prompts"])).tokens_ns
    forward_only(model, tokens_ns, 1, with_logits=True, consume=lambda out, _: logits.append(whole(out)))
    if logits:
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
        torch.save(torch.cat(logits), Path(job["out"]) / f"{name}-{runtime.place('dp')}.pt")


def whole(logits: torch.Tensor) -> torch.Tensor:
    """A copy, with the vocabulary shards of tensor parallel ranks together."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    if runtime.size("tp") == 1:
        return logits.clone()
    return gather_from_tensor_model_parallel_region(logits, group=runtime.group("tp"))


def say(job: Job, **what: Any) -> None:
    if runtime.rank() == 0:
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
        (Path(job["out"]) / "result.json").write_text(json.dumps(what))


KINDS: dict[str, Callable[[Job], Any]] = {
    "work": work, "score": score, "refused": refused, "candidate": candidate, "reload": reload,
    "export": export,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    for job in json.loads(Path(arguments[0]).read_text()):
        KINDS[job.get("kind", "work")](job)
        runtime.barrier()
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
