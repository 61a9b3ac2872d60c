"""Distils a pruned model from its parent: torchrun launch/distill.py --help."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence

from mbridge_prune import cli, config, runtime
from mbridge_prune.distill.settings import Settings, check, check_batches
from mbridge_prune.files import write_json
from mbridge_prune.run_folder import SETTINGS, check_run_folder

log = logging.getLogger("mbridge_prune")


def main(arguments: Sequence[str]) -> int:
    settings, _known = config.from_command_line(arguments, Settings)
    check(settings)

    from mbridge_prune.bridge.export import export_hf
    from mbridge_prune.distill import training
    from mbridge_prune.distill.checkpoints import settle
    from mbridge_prune.distill.models import Student, check_family, load_teacher

    folder, hf_folder, parallel = settings.run_folder(), settings.hf_folder(), settings.parallel
    runtime.start_distributed()
    check_batches(settings, runtime.world_size())
    vocab_size, tokenizer = check_family(settings)
    check_run_folder(settings)
    write_json(folder / SETTINGS, settings.to_dict())
    runtime.barrier()
    cli.log_to_file(folder / "run.log")
    log.info("mbridge_prune on %s", runtime.describe())
    begin = settle(settings.checkpoints())
    runtime.start_model_parallel(parallel.pp, parallel.tp, parallel.ep, parallel.cp)
    teacher = load_teacher(settings)
    student = Student(settings, teacher, resumed=begin > 0)
    try:
        module = training.train(settings, student, vocab_size, begin)
    except training.Stopped as stopped:
        log.info("%s: the same command goes on from the checkpoint", stopped)
        return training.STOPPED
    runtime.start_model_parallel(parallel.pp, parallel.tp, parallel.ep, parallel.cp)
    export_hf(
        student.bridge,
        [module],
        hf_folder,
        layers_kept=list(range(module.config.num_layers)),
        trust_remote_code=settings.model.trust_remote_code,
        tokenizer=tokenizer,
        source=settings.model.student,
    )
    log.info("wrote %s", shlex.quote(str(hf_folder)))
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
