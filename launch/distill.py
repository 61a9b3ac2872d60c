"""Distils a pruned model from its parent: torchrun launch/distill.py --help."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mbridge_prune import cli, config, runtime
from mbridge_prune.distill.settings import Settings, check, check_batches, what_is_learnt
from mbridge_prune.files import write_json
from mbridge_prune.run_folder import SETTINGS, check_run_folder, timed

log = logging.getLogger("mbridge_prune")


def main(arguments: Sequence[str]) -> int:
    settings, known = config.from_command_line(arguments, Settings)
    check(settings)

    from mbridge_prune.bridge.exported import holds, refuse_foreign
    from mbridge_prune.distill.checkpoints import describe, settle
    from mbridge_prune.distill.models import Student, check_device, check_family, find_student, load_teacher
    from mbridge_prune.distill.report import RESULT
    from mbridge_prune.distill.training import STOPPED, Stopped, train

    # 1. All that can be refused without weights: batches, the models' kinship, data, the folder.
    parallel = settings.parallel
    find_student(settings)
    runtime.start_distributed()
    if known.dry_run:
        return dry_run(settings)
    check_device(settings)
    check_batches(settings, runtime.world_size())
    vocab_size, tokenizer = check_family(settings)
    say_data(settings, vocab_size, tokenizer)
    folder, hf_folder = settings.run_folder(), settings.hf_folder()
    record = {"distilled": what_is_learnt(settings.to_dict())}
    check_run_folder(settings, lambda begun, now: what_is_learnt(begun) == what_is_learnt(now.to_dict()))
    if holds(hf_folder, record) and runtime.gather_objects((folder / RESULT).is_file())[0]:
        log.info("%s is already finished with these settings: nothing to do", folder)
        return 0
    refuse_foreign(hf_folder)
    write_json(folder / SETTINGS, settings.to_dict())
    runtime.barrier()
    cli.log_to_file(folder / "run.log")
    log.info("mbridge_prune on %s", runtime.describe())
    begin = settle(settings.checkpoints())
    describe(settings.checkpoints(), settings.model.student or "")
    if begin:
        log.info("going on from the checkpoint of step %d", begin)

    # 2. The teacher; the student is built by the training loop, which gets it back from its checkpoint.
    times: dict[str, float] = {}
    runtime.start_model_parallel(parallel.pp, parallel.tp, parallel.ep, parallel.cp)
    with timed("teacher", times):
        teacher = load_teacher(settings)
    student = Student(settings, teacher, resumed=begin > 0)

    # 3. Megatron-Bridge's loop.
    try:
        with timed("training", times):
            module = train(settings, student, vocab_size, begin)
    except Stopped as stopped:
        log.info("%s; a checkpoint was written, the same command goes on from it", stopped)
        return STOPPED

    # 4. An ordinary Hugging Face folder, and what happened.
    finish(settings, student.bridge, module, tokenizer, record, times)
    return 0


def finish(
    settings: Settings,
    bridge: Any,
    module: Any,
    tokenizer: Any,
    record: Mapping[str, Any],
    times: dict[str, float],
) -> None:
    """Exports the student, writes distill.json and the report, and says where all of it is."""
    from mbridge_prune.bridge.export import export_hf
    from mbridge_prune.bridge.exported import holds
    from mbridge_prune.distill.report import RESULT, model_card, outcome, write_report

    folder, hf_folder, parallel = settings.run_folder(), settings.hf_folder(), settings.parallel
    runtime.start_model_parallel(parallel.pp, parallel.tp, parallel.ep, parallel.cp)  # the loop ended its own
    result = outcome(settings, times)
    if not holds(hf_folder, record):
        with timed("export", times):
            export_hf(
                bridge,
                [module],
                hf_folder,
                layers_kept=range(module.config.num_layers),
                trust_remote_code=settings.model.trust_remote_code,
                tokenizer=tokenizer,
                source=settings.model.student,
                model_card=model_card(result),
                record=record,
            )
    write_json(folder / RESULT, result)
    runtime.barrier()
    report = write_report(folder)
    wrote = {
        hf_folder: "the distilled model",
        settings.checkpoints(): "Megatron checkpoints",
        folder / "losses.jsonl": "losses of every step",
        folder / "tensorboard": "TensorBoard's event files",
        report: "loss curves",
    }
    log.info("wrote\n%s", "\n".join(f"  {path}  {what}" for path, what in wrote.items()))
    quoted = shlex.quote(str(hf_folder))
    log.info("next: measure it with\n  python launch/evaluate.py --hf-path %s --data TEXT_FILE", quoted)


def say_data(settings: Settings, vocab_size: int, tokenizer: Any) -> None:
    """Checks the datasets, and logs how often the run reads them."""
    from mbridge_prune.blends import blend
    from mbridge_prune.distill.data import check_prefixes
    from mbridge_prune.distill.models import vocabulary_fingerprint
    from mbridge_prune.errors import UserError

    vocabulary = vocabulary_fingerprint(tokenizer)
    if not settings.data.train:
        raise UserError("no data: give --data PREFIX, an indexed dataset of launch/prepare_data.py")
    if settings.validate.steps and not settings.data.valid:
        raise UserError("no validation data: give --valid-data PREFIX, or --eval-iters 0 for none")
    tokens = check_prefixes(blend(settings.data.train)[0], vocab_size, vocabulary)
    if settings.validate.steps:
        check_prefixes(blend(settings.data.valid)[0], vocab_size, vocabulary)
    wanted = settings.steps() * settings.tokens_a_step()
    log.info(
        "data: %s tokens, the run reads %s of them (%.2f epochs)",
        f"{tokens:,}",
        f"{wanted:,}",
        wanted / tokens,
    )


def dry_run(settings: Settings) -> int:
    """Prints the plan and the memory of every stage, for a job on GPUs; this machine need not have any."""
    from mbridge_prune.distill.forecast import memory, memory_table, plan_table
    from mbridge_prune.distill.models import check_family
    from mbridge_prune.report.console import console

    parallel, model = settings.parallel, settings.model
    model.dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    world = parallel.world_size or max(runtime.world_size(), parallel.fewest_ranks())
    replicas = check_batches(settings, world)
    check_family(settings, weights=False)
    out = console()
    out.print(plan_table(settings, world, replicas))
    out.print(memory_table(memory(settings, replicas)))
    log.info("dry run: no weights were read, nothing was written")
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
