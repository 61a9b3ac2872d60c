"""Prunes a Hugging Face language model to a given architecture: torchrun launch/prune.py --help."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbridge_prune import cli, config, runtime
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")
PLAN, SETTINGS = "plan.json", "settings.json"


def main(arguments: Sequence[str]) -> int:
    settings, known = config.from_command_line(arguments)
    if not settings.model.hf_path:
        raise UserError("no model: give --hf-path FOLDER (or model.hf_path in the config)")
    overrides = provider_overrides(settings)
    if known.dry_run:
        return dry_run(settings, overrides)

    from mbridge_prune import (
        export_hf,
        get_hf_mbridge_calibration_loop,
        load_mbridge_model_from_hf,
        prune,
        score,
    )
    from mbridge_prune.bridge.export import refuse_full_folder
    from mbridge_prune.bridge.load import check_hf_folder, load_tokenizer
    from mbridge_prune.dry_run import check_target
    from mbridge_prune.report.console import before_after, console
    from mbridge_prune.report.model_card import model_card

    folder, hf_folder = settings.run_folder(), settings.hf_folder()
    check_before_start(settings)
    check_hf_folder(settings.model.hf_path)
    runtime.start_distributed()
    if finished(settings):
        log.info("%s is already finished with these settings: nothing to do", folder)
        return 0
    # What a run that was begun with these settings has written is its own.
    if not check_run_folder(settings):
        refuse_full_folder(hf_folder)
        if settings.output.megatron_path:
            refuse_full_folder(Path(settings.output.megatron_path))
    # 1. All that can be refused without the weights: model, layout, layers, sizes, text.
    trust = settings.model.trust_remote_code
    provider = check_target(
        settings.model.hf_path,
        settings.prune.export_config,
        provider_overrides=overrides,
        divisors=settings.prune.divisors(),
        trust_remote_code=trust,
        score_only=settings.prune.score_only,
    )
    tokenizer = load_tokenizer(settings.model.hf_path, trust)
    loop = None
    if settings.calibration.data:
        calibration = settings.calibration
        loop = get_hf_mbridge_calibration_loop(
            model=None,
            provider=provider,
            tokenizer=tokenizer,
            hf_model_name_or_path=settings.model.hf_path,
            dataset_name=calibration.data,
            num_samples=calibration.num_samples,
            micro_batch_size=calibration.batch_size,
            split=calibration.split,
            text_key=calibration.text_key,
            apply_chat_template=calibration.chat_template,
            add_bos=calibration.add_bos,
            seed=calibration.seed,
        )
    write_json(folder / SETTINGS, settings.to_dict())
    runtime.barrier()
    cli.log_to_file(folder / "run.log")
    log.info("mbridge_prune on %s", runtime.describe())

    # 2. The Hugging Face model, imported into Megatron on every rank.
    times: dict[str, float] = {}
    with timed("import", times):
        bridge, _, model, unwrapped, _ = load_mbridge_model_from_hf(
            hf_model_name_or_path=settings.model.hf_path,
            provider_overrides=overrides,
            trust_remote_code=trust,
        )

    log.info("import: %s in %.1f s", settings.model.hf_path, times["import"])

    # 3. Scores, ranking, cut.
    config_of_prune = {
        "forward_loop": loop,
        "checkpoint": settings.scores_file(),
        "importance": settings.prune.importance,
        "repair": settings.prune.repair,
        "skip_sorting": settings.prune.skip_sorting,
    }
    if settings.prune.score_only:
        score(unwrapped, config_of_prune)
        log.info(
            "next: prune with them, at any pipeline, expert and data parallel layout\n"
            "  torchrun ... launch/prune.py --hf-path %s --scores %s --prune-export-config ... --output ...",
            shlex.quote(settings.model.hf_path), shlex.quote(str(settings.scores_file())),
        )  # fmt: skip
        return 0
    with timed("prune", times):
        _, plan = prune(
            unwrapped,
            mode=[("mcore_minitron", settings.prune.divisors())],
            constraints={"export_config": settings.prune.export_config},
            config=config_of_prune,
        )

    # 4. An ordinary Hugging Face folder, and a Megatron checkpoint when asked.
    if not runtime.gather_objects(has_files(hf_folder))[0]:
        with timed("export", times):
            export_hf(
                bridge,
                model,
                hf_folder,
                layers_kept=plan.layers_kept,
                sizes=plan.sizes_after,
                trust_remote_code=trust,
                tokenizer=tokenizer,
                source=settings.model.hf_path,
                model_card=model_card(plan, settings.model.hf_path, calibration_facts(settings, plan)),
            )
    megatron = settings.output.megatron_path
    if megatron and not runtime.gather_objects(has_files(Path(megatron)))[0]:
        from mbridge_prune.bridge.megatron import save_megatron

        with timed("megatron checkpoint", times):
            save_megatron(bridge, model, settings.output.megatron_path, hf_folder=hf_folder)

    # 5. What happened.
    write_json(folder / PLAN, {**plan.to_dict(), "seconds": times, "settings": settings.to_dict()})
    runtime.barrier()
    console().print(before_after(plan))
    wrote = [f"  {hf_folder}  the pruned model", f"  {settings.scores_file()}  importance scores"]
    if settings.output.megatron_path:
        wrote.append(f"  {settings.output.megatron_path}  Megatron checkpoint")
    wrote += [f"  {folder / PLAN}  what was kept", f"  {folder / 'run.log'}  this log"]
    log.info("wrote\n%s", "\n".join(wrote))
    data = settings.calibration.data or ""
    text = shlex.quote(data) if data.endswith(".txt") else "TEXT_FILE"
    compare = f"python launch/evaluate.py --hf-path {shlex.quote(str(hf_folder))} --data {text}"
    log.info("next: measure it with\n  %s\nand distil it from its parent before use", compare)
    return 0


def dry_run(settings: config.Settings, overrides: dict[str, Any]) -> int:
    """Prints choices, sizes, parameters and memory from the config alone."""
    from mbridge_prune import dry_run as dry
    from mbridge_prune.report.console import before_after, console

    result = dry.forecast(
        settings.model.hf_path or "",
        settings.prune.export_config,
        provider_overrides=overrides,
        divisors=settings.prune.divisors(),
        trust_remote_code=settings.model.trust_remote_code,
    )
    out = console()
    out.print(before_after(result.plan))
    out.print(dry.show(result))
    for hparam, sizes in result.choices.items():
        out.print(f"choices of {hparam}: {', '.join(map(str, sizes))}")
    log.info("dry run: no weights were read, nothing was written")
    return 0


def provider_overrides(settings: config.Settings) -> dict[str, Any]:
    """The Megatron-Bridge provider fields that the settings name."""
    import torch

    parallel = settings.parallel
    overrides: dict[str, Any] = {
        "pipeline_model_parallel_size": parallel.pp,
        "tensor_model_parallel_size": parallel.tp,
        "expert_model_parallel_size": parallel.ep,
        "seq_length": settings.calibration.seq_length,
    }
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        if getattr(parallel, name) is not None:
            overrides[name] = getattr(parallel, name)
    if settings.model.dtype != "auto":
        overrides["params_dtype"] = overrides["pipeline_dtype"] = getattr(torch, settings.model.dtype)
    return overrides


def check_before_start(settings: config.Settings) -> None:
    """What can be refused without a model."""
    if not settings.prune.export_config and not settings.prune.score_only:
        raise UserError("nothing to prune: give --prune-export-config '{\"ffn_hidden_size\": 1152}'")
    if settings.prune.score_only and settings.prune.skip_sorting:
        raise UserError(
            "--score-only and --skip-sorting exclude each other: one makes what the other does without"
        )
    if settings.calibration.data is None and not settings.prune.skip_sorting:
        if not settings.scores_file().exists():
            raise UserError(
                f"no calibration text (--calib-data) and no scores file at {settings.scores_file()}: "
                "give one of them"
            )
    data = settings.calibration.data
    if data and (data.startswith((".", "/", "~")) or Path(data).suffix) and not Path(data).exists():
        raise UserError(f"no such calibration data: {data}")


def finished(settings: config.Settings) -> bool:
    """True where the run folder holds the finished result of exactly these settings."""
    plan = settings.run_folder() / PLAN
    if not plan.is_file():
        return False
    same = json.loads(plan.read_text())["settings"] == settings.to_dict()
    return same and settings.hf_folder().is_dir()


def has_files(folder: Path) -> bool:
    """True for a folder with something in it; ours are renamed into place when complete."""
    return folder.is_dir() and any(folder.iterdir())


def check_run_folder(settings: config.Settings) -> bool:
    """A run folder is empty, or was begun with the same settings and is taken up again (True)."""
    folder = settings.run_folder()
    problem, again = None, False
    if runtime.rank() == 0 and folder.exists():
        begun = folder / SETTINGS
        if not folder.is_dir():
            problem = f"{folder} is a file; give a folder for the run"
        elif begun.is_file():
            if json.loads(begun.read_text()) != settings.to_dict():
                problem = f"run folder {folder} was begun with other settings; give another --output"
            else:
                again = True
                log.info("taking up the run in %s again", folder)
        elif any(folder.iterdir()):
            problem = f"run folder {folder} is not empty; give another --output"
    problem, again = runtime.gather_objects((problem, again))[0]
    if problem:
        raise UserError(problem)
    return again


def calibration_facts(settings: config.Settings, plan: Any) -> dict[str, Any]:
    return {
        "calibration": f"{settings.calibration.data}, {plan.calibration.get('tokens', 0):,} tokens, "
        f"fingerprint {plan.calibration.get('data')}",
        "model fingerprint": plan.fingerprint,
    }


def write_json(path: Path, content: Any) -> None:
    """Rank 0 writes aside and renames."""
    if runtime.rank() == 0:
        aside = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(aside, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error}") from error


class timed:
    """Adds the seconds of its block to a dict."""

    def __init__(self, name: str, times: dict[str, float]):
        self.name, self.times = name, times

    def __enter__(self) -> None:
        self.begin = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self.times[self.name] = round(time.monotonic() - self.begin, 2)


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
