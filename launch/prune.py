"""Prunes a Hugging Face language model to a target or a budget: torchrun launch/prune.py --help."""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_prune import cli, config, runtime
from mbridge_prune.errors import UserError
from mbridge_prune.files import write_json
from mbridge_prune.run_folder import (
    CANDIDATES,
    PLAN,
    RUNNERS_UP,
    SETTINGS,
    another_search,
    check_run_folder,
    finished,
    set_aside,
    timed,
)

if TYPE_CHECKING:
    from mbridge_prune.bridge.source import Source

log = logging.getLogger("mbridge_prune")

CALIBRATION = {f.name: f.metadata["flags"][0] for f in dataclasses.fields(config.Calibration)}
"""Setting -> its flag."""


def main(arguments: Sequence[str]) -> int:
    settings, known = config.from_command_line(arguments)
    from mbridge_prune.bridge.source import Source

    source = Source.of(settings.model.hf_path, settings.model.megatron_path)
    if source.iteration:
        settings.model.megatron_path = str(source.iteration)  # a later iteration is another run
    overrides = provider_overrides(settings)
    check_words(settings)
    if known.dry_run:
        return dry_run(settings, source, overrides)

    from mbridge_prune import export_hf, prune, score
    from mbridge_prune.bridge.export import refuse_full_folder
    from mbridge_prune.bridge.exported import holds, record_of, remove_stale
    from mbridge_prune.bridge.load import load_tokenizer
    from mbridge_prune.dry_run import check_target
    from mbridge_prune.mcore_minitron import table_of
    from mbridge_prune.prune_config import PruneConfig
    from mbridge_prune.report.console import before_after, console
    from mbridge_prune.report.model_card import model_card
    from mbridge_prune.report.page import REPORT, write_report
    from mbridge_prune.report.trackers import Trackers, send_run
    from mbridge_prune.report.versions import versions
    from mbridge_prune.search.search import NotGoodEnough

    folder, hf_folder = settings.run_folder(), settings.hf_folder()
    check_before_start(settings)
    source.check()
    runtime.start_distributed()
    if finished(settings):
        if not (folder / REPORT).exists():  # killed when only the page was missing
            write_report(folder)
        log.info("%s is already finished with these settings: nothing to do", folder)
        return 0
    # What a run that was begun with these settings has written is its own.
    if not check_run_folder(settings, anew=another_search):
        refuse_full_folder(hf_folder)
        if settings.output.megatron_path:
            refuse_full_folder(Path(settings.output.megatron_path))
    # 1. All that can be refused without the weights: model, layout, layers, sizes, budget, text.
    trust = settings.model.trust_remote_code
    budgets = settings.search.budgets()
    divisors = settings.prune.divisors(usual=bool(budgets))
    searching = (budgets, search_config(settings)) if budgets else None
    provider = check_target(
        source.hf_path,
        settings.prune.export_config,
        provider_overrides=overrides,
        divisors=divisors,
        trust_remote_code=trust,
        score_only=settings.prune.score_only,
        search=searching,
        experts=settings.prune.experts,
    )
    tokenizer = load_tokenizer(source.hf_path, trust)
    loop = calibration_loop(settings, source, provider, tokenizer) if settings.calibration.data else None
    score_func = score_function_of(settings, tokenizer, loop) if budgets else None
    trackers = Trackers(settings.output.tensorboard_dir, settings.output.wandb_project)
    set_aside(settings)
    write_json(folder / SETTINGS, settings.to_dict())
    runtime.barrier()
    cli.log_to_file(folder / "run.log")
    log.info("mbridge_prune on %s", runtime.describe())

    # 2. The model in Megatron, on every rank.
    times: dict[str, float] = {}
    with timed("import", times):
        bridge, _, model, unwrapped, _ = source.load(overrides, trust)
    log.info("import: %s in %.1f s", source.name, times["import"])

    # 3. Scores, ranking, cut.
    config_of_prune = {
        "forward_loop": loop,
        "checkpoint": settings.scores_file(),
        "importance": settings.prune.importance,
        "depth": settings.prune.depth,
        "experts": settings.prune.experts,
        "repair": settings.prune.repair,
        "repair_memory_gb": settings.prune.repair_memory_gb,
        "repair_offload": settings.prune.repair_offload,
        "skip_sorting": settings.prune.skip_sorting,
    }
    repair = PruneConfig.of(config_of_prune).repair_made()
    if settings.prune.score_only:
        score(unwrapped, config_of_prune)
        log.info(
            "next: prune with them, at any pipeline, expert and data parallel layout\n"
            "  %s",
            prune_command(settings, source, table_of(unwrapped).hparams()),
        )  # fmt: skip
        return 0
    if budgets:

        def export_candidate(place: int, _: Any, sizes: dict[str, int], layers: list[int]) -> None:
            one = folder / RUNNERS_UP / f"{place + 1:02d}"
            record = record_of(source.name, settings.scores_file(), sizes, layers, repair)
            if not holds(one, record):
                export_hf(bridge, model, one, layers_kept=layers, sizes=sizes, trust_remote_code=trust,
                          tokenizer=tokenizer, source=source.hf_path, record=record)  # fmt: skip

        config_of_prune |= {
            **search_config(settings),
            "score_func": score_func,
            "candidates": folder / CANDIDATES,
            "export_candidate": export_candidate,
        }
    scored_before = runtime.gather_objects(settings.scores_file().exists())[0]
    try:
        with timed("prune", times):
            _, plan = prune(
                unwrapped,
                mode=[("mcore_minitron", divisors)],
                constraints=budgets or {"export_config": settings.prune.export_config},
                config=config_of_prune,
            )
    except NotGoodEnough:
        log.info("what the search found: %s", write_report(folder))
        raise

    # 4. An ordinary Hugging Face folder, and a Megatron checkpoint when asked.
    record = record_of(source.name, settings.scores_file(), plan.sizes_after, plan.layers_kept, repair)
    if not holds(hf_folder, record):
        with timed("export", times):
            export_hf(
                bridge,
                model,
                hf_folder,
                layers_kept=plan.layers_kept,
                sizes=plan.sizes_after,
                trust_remote_code=trust,
                tokenizer=tokenizer,
                source=source.hf_path,
                model_card=model_card(plan, source.name, calibration_facts(settings, plan)),
                record=record,
            )
    megatron = settings.output.megatron_path
    if megatron and not holds(Path(megatron), record):
        from mbridge_prune.bridge.megatron import save_megatron

        with timed("megatron checkpoint", times):
            save_megatron(bridge, model, megatron, hf_folder=hf_folder, record=record)

    # 5. What happened.
    made = {"seconds": times, "versions": versions(), "settings": settings.to_dict()}
    write_json(folder / PLAN, {**plan.to_dict(), **made})
    remove_stale(folder / RUNNERS_UP, settings.search.export_top_k)
    runtime.barrier()
    report = write_report(folder)
    console().print(before_after(plan))
    tell_what_next(settings, report, scored_before)
    with trackers:
        send_run(trackers, plan.to_dict(), folder / CANDIDATES)
    return 0


def dry_run(settings: config.Settings, source: Source, overrides: dict[str, Any]) -> int:
    """Prints choices, sizes, parameters and memory from the config alone."""
    from mbridge_prune import dry_run as dry
    from mbridge_prune.report.console import before_after, console

    budgets = settings.search.budgets()
    result = dry.forecast(
        source.hf_path,
        settings.prune.export_config,
        provider_overrides=overrides,
        divisors=settings.prune.divisors(usual=bool(budgets)),
        trust_remote_code=settings.model.trust_remote_code,
        search=(budgets, search_config(settings)) if budgets else None,
        experts=settings.prune.experts,
    )
    out = console()
    if result.space is not None:
        out.print(result.space)
        log.info("%s", result.in_budget)
    else:
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


def calibration_loop(settings: config.Settings, source: Source, provider: Any, tokenizer: Any) -> Any:
    """The forward loop over the calibration text; a search's held-out text is kept aside in it."""
    from mbridge_prune import get_hf_mbridge_calibration_loop

    calibration = settings.calibration
    return get_hf_mbridge_calibration_loop(
        model=None,
        provider=provider,
        tokenizer=tokenizer,
        hf_model_name_or_path=source.hf_path,
        dataset_name=calibration.data,
        num_samples=calibration.num_samples,
        micro_batch_size=calibration.batch_size,
        split=calibration.split,
        text_key=calibration.text_key,
        apply_chat_template=calibration.chat_template,
        add_bos=calibration.add_bos,
        seed=calibration.seed,
        held_out=settings.search.num_samples if settings.search.budgets() else 0,
    )


def search_config(settings: config.Settings) -> dict[str, Any]:
    """The keys of `prune(config=...)` that tell a search what to choose from."""
    from mbridge_prune.evaluate.score_functions import load_function
    from mbridge_prune.search.callables import Named

    search, wanted = settings.search, None
    if search.candidate_filter:
        function, source = load_function(search.candidate_filter)
        wanted = Named(search.candidate_filter, source, function)
    return {
        "top_k": search.top_k,
        "max_width_pruning": search.max_width_pruning,
        "max_depth_pruning": search.max_depth_pruning,
        "hparams_to_skip": search.hparams_to_skip,
        "search_space": search.space,
        "candidate_filter": wanted,
        "score_lower_bound": search.score_lower_bound,
        "export_top_k": search.export_top_k,
        "serving": {
            "batch_size": search.batch_size,
            "seq_length": search.seq_length,
            "kv_dtype": search.kv_dtype,
        },
    }


def score_function_of(settings: config.Settings, tokenizer: Any, loop: Any) -> Callable[[Any], float] | str:
    """The score that --prune-score-func names; "kl" and "loss" are the search's own."""
    from mbridge_prune.evaluate.score_functions import score_function
    from mbridge_prune.prune_config import SCORES

    name = settings.search.score_func
    if name in SCORES:
        return name
    held_out = getattr(loop, "held_out_ns", None)
    return score_function(name, tokenizer=tokenizer, tokens_ns=held_out, data=settings.search.mmlu_data)


def check_before_start(settings: config.Settings) -> None:
    """What can be refused without a model."""
    targets = [bool(settings.prune.export_config), bool(settings.search.budgets()), settings.prune.score_only]
    if not any(targets):
        raise UserError(
            "nothing to prune: give --prune-export-config '{\"ffn_hidden_size\": 1152}', or a budget such as "
            "--prune-target-params 70%"
        )
    if sum(targets) > 1:
        raise UserError("give one of an export config, a budget (--prune-target-...) and --score-only")
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
    if settings.prune.repair not in ("auto", "none") and settings.calibration.data is None:
        raise UserError(f"--repair {settings.prune.repair} runs the model on text: give --calib-data")


def check_words(settings: config.Settings) -> None:
    """What a dry run refuses as well: settings without effect, names and files that are not there."""
    from mbridge_prune.calibration.packing import sources_of
    from mbridge_prune.evaluate.score_functions import check_available, load_function

    search, data = settings.search, settings.calibration.data
    if not search.budgets() and search.changed():
        raise UserError(
            f"{search.changed()[0]} is of a search and has no effect here: give a budget "
            "(--prune-target-...) as well, or leave it out"
        )
    check_methods(settings)
    check_available(search.score_func, search.mmlu_data)
    if search.candidate_filter:
        load_function(search.candidate_filter)
    for each in sources_of(data)[0] if data else ():
        if (each.startswith((".", "/", "~")) or Path(each).suffix) and not Path(each).expanduser().exists():
            raise UserError(f"no such calibration data: {each}")


def check_methods(settings: config.Settings) -> None:
    """Refuses rankings and repairs that this layout cannot have, or that would have no effect."""
    from mbridge_prune.prune_config import GREEDY

    prune, parallel = settings.prune, settings.parallel
    if prune.importance == "weighted" and prune.score_only and parallel.tp > 1:
        raise UserError("--importance weighted reads whole weights: use --tp 1, or --importance minitron")
    if prune.depth in GREEDY and parallel.tp > 1:
        raise UserError(f"--depth {prune.depth} compares predictions: use --tp 1, or --depth cosine")
    if prune.depth in GREEDY and prune.export_config and "num_layers" not in prune.export_config:
        raise UserError(
            f"--depth {prune.depth} has no effect here: no num_layers in the export config; leave it out"
        )
    if prune.repair_offload and prune.repair in ("none", "norm"):
        raise UserError(f"--repair-offload has no effect with --repair {prune.repair}, which keeps no sums")
    if prune.repair not in ("auto", "none") and prune.score_only:
        raise UserError(f"--repair {prune.repair} has no effect with --score-only, which cuts nothing")


def tell_what_next(settings: config.Settings, report: Path, scored_before: bool) -> None:
    """Logs where everything is, and the next command."""
    folder, hf_folder = settings.run_folder(), settings.hf_folder()
    wrote: dict[Path | str, str] = {hf_folder: "the pruned model"}
    if not scored_before:
        wrote[settings.scores_file()] = "importance scores"
    if settings.output.megatron_path:
        wrote[settings.output.megatron_path] = "Megatron checkpoint"
    wrote |= {folder / PLAN: "what was kept", folder / "run.log": "this log", report: "all of it to look at"}
    log.info("wrote\n%s", "\n".join(f"  {path}  {what}" for path, what in wrote.items()))
    data = settings.calibration.data or ""
    text = shlex.quote(data) if data.endswith(".txt") and Path(data).is_file() else "TEXT_FILE"
    compare = f"python launch/evaluate.py --hf-path {shlex.quote(str(hf_folder))} --data {text}"
    log.info("next: measure it with\n  %s\nand distil it from its parent before use", compare)


def prune_command(settings: config.Settings, source: Source, full: dict[str, int]) -> str:
    """The command that prunes with the scores of this run: a quarter of the FFN goes, or of the layers."""
    hparam = next((h for h in ("ffn_hidden_size", "moe_ffn_hidden_size") if h in full), "num_layers")
    step = 64 if full[hparam] >= 256 else 1
    size = max(1, full[hparam] * 3 // 4 // step * step)
    model, parallel = settings.model, settings.parallel
    words: list[str] = ["launch/prune.py", *source.flags]
    words += ["--trust-remote-code"] if model.trust_remote_code else []
    words += ["--dtype", model.dtype] if model.dtype != "auto" else []
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        given = getattr(parallel, name)
        words += [f"--{name.replace('_', '-')}", str(given)] if given is not None else []
    words += ["--pp", str(parallel.pp)] if parallel.pp > 1 else []
    words += ["--ep", str(parallel.ep)] if parallel.ep > 1 else []
    words += ["--importance", settings.prune.importance, "--scores", str(settings.scores_file())]
    words += ["--depth", settings.prune.depth] if settings.prune.depth != "cosine" else []
    words += ["--experts", settings.prune.experts] if settings.prune.experts != "gated" else []
    for key, flag in CALIBRATION.items():  # the repair reads the text again
        value = getattr(settings.calibration, key)
        if value != getattr(config.Calibration(), key):
            words += [flag] if value is True else [flag, str(value)]
    words += [
        "--prune-export-config",
        json.dumps({hparam: size}),
        "--output",
        f"{settings.run_folder()}-pruned",
    ]
    ranks = parallel.pp * parallel.ep
    start = f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python"
    return f"{start} {shlex.join(words)}"


def calibration_facts(settings: config.Settings, plan: Any) -> dict[str, Any]:
    return {
        "calibration": f"{settings.calibration.data}, {plan.calibration.get('tokens', 0):,} tokens, "
        f"fingerprint {plan.calibration.get('data')}",
        "model fingerprint": plan.fingerprint,
    }


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
