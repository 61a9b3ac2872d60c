"""From settings to run folder: what the commands of heterogeneous pruning share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mbridge_prune import cli, runtime
from mbridge_prune.files import write_json
from mbridge_prune.heterogeneous.saved import save
from mbridge_prune.heterogeneous.settings import PRUNED
from mbridge_prune.plan import Plan
from mbridge_prune.report.versions import versions
from mbridge_prune.run_folder import PLAN, SETTINGS, Settings, check_run_folder, finished, timed

log = logging.getLogger("mbridge_prune")
MAP = "sensitivity.jsonl"


@dataclass
class Job:
    """What is pruned, and how.

    Args:
        prune: the model in, the plan of its cut out; given the file for the sensitivity map.
        finish: called with the pruned model and the run folder, for what a command writes besides.
    """

    model: nn.Module
    prune: Callable[[nn.Module, Path], Plan]
    finish: Callable[[nn.Module, Path], Mapping[str, str]] = lambda model, folder: {}


def run(settings: Settings, load: Callable[[], Job]) -> int:
    """Begins or takes up the run folder, loads, prunes, saves, reports.

    Args:
        load: builds the model and what it is measured with; called once the folder is known to be ours.
    """
    from mbridge_prune.report.heterogeneous import write_report

    folder = settings.run_folder()
    runtime.start_distributed()
    if finished(settings):
        log.info("%s is already finished with these settings: nothing to do", folder)
        return 0
    check_run_folder(settings)
    times: dict[str, float] = {}
    with timed("load", times):
        job = load()
    write_json(folder / SETTINGS, settings.to_dict())
    runtime.barrier()
    cli.log_to_file(folder / "run.log")
    log.info("mbridge_prune on %s", runtime.describe())
    with timed("prune", times):
        plan = job.prune(job.model, folder / MAP)
    with timed("save", times):
        save(job.model, folder / PRUNED)
        more = job.finish(job.model, folder)
    made = {"seconds": times, "versions": versions(), "settings": settings.to_dict()}
    write_json(folder / PLAN, {**plan.to_dict(), **made})
    runtime.barrier()
    report = write_report(folder)
    wrote = {PRUNED: "the pruned model", **more, PLAN: "what was kept", MAP: "what each axis loses",
             "run.log": "this log", report.name: "all of it to look at"}  # fmt: skip
    said = [f"  {folder / name}  {what}" for name, what in wrote.items() if (folder / name).exists()]
    log.info("wrote\n%s", "\n".join(said))
    log.info(
        "next: model = mbridge_prune.restore(BUILD_THE_FULL_MODEL(), %r), and train it further before use",
        str(folder / PRUNED),
    )
    return 0
