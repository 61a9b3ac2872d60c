"""Scores a Hugging Face model, pruned or not: loss, KL from its parent, MMLU. See --help.

Through Megatron by default, under any pipeline, tensor, data and expert parallel layout and by the code that
a search ranks candidates with; --backend transformers is the independent check.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbridge_prune import cli, runtime
from mbridge_prune.config import Parser
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.files import write_json

if TYPE_CHECKING:
    from mbridge_prune.evaluate.models import Models

METRICS = ("loss", "kl", "mmlu")
BACKENDS = ("auto", "megatron", "transformers")
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--hf-path", required=True, help="Hugging Face model folder")
    add("--metrics", help="some of loss, kl, mmlu and other score functions (mmlu_100pct_5shot_bs8, "
        "module:function), with commas between (default: loss, as one line)")  # fmt: skip
    add("--data", help="text to predict, for loss and kl: a text file, .jsonl, .parquet or token file")
    add("--window", type=int, default=512, help="tokens a window (default: 512)")
    add("--windows", type=int, default=40, help="windows at most (default: 40)")
    add("--add-bos", action="store_true", help="begin every window with the BOS token")
    add("--reference-hf-path", metavar="PARENT", help="the model that kl measures the distance from")
    add("--kl-positions", type=int, default=2048, help="random positions kl is measured at (default: 2048)")
    add("--mmlu-data", metavar="DIR", help="a local copy of MMLU (default: cais/mmlu of the hub)")
    add("--mmlu-percentage", type=float, default=10.0, help="of every subject's questions (default: 10)")
    add("--few-shot", type=int, default=0, help="examples before a question of mmlu (default: 0)")
    add("--batch-size", type=int, default=1, help="windows or prompts a microbatch (default: 1)")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--backend", choices=BACKENDS, default="auto",
        help="auto is megatron wherever Megatron-Bridge knows the architecture")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float32", help="of weights and forward (default: float32)")
    add("--pp", type=int, default=1, help="pipeline stages; layers need not divide (default: 1)")
    add("--ep", type=int, default=1, help="expert parallel ranks, of the data parallel ones (default: 1)")
    add("--tp", type=int, default=1, help="tensor parallel ranks (default: 1)")
    add("--output", metavar="FILE.json", help="also write the results here")
    add("--trust-remote-code", action="store_true", help="let transformers run the model's own code")
    return parser


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(list(arguments))
    names = metrics(options)
    check_options(options, names)

    # 1. All that can be refused without the weights: models, layout, text, questions.
    from mbridge_prune.evaluate.divergence import Reference
    from mbridge_prune.evaluate.score_functions import score_function
    from mbridge_prune.report.console import progress_bar

    paths = [path for path in (options.reference_hf_path if "kl" in names else None, options.hf_path) if path]
    runtime.start_distributed()
    models = open_models(options, paths)
    vocab = models.check(paths)
    tokenizer = load_tokenizer(options)
    tokens_ns = text(options, tokenizer, vocab) if options.data else None
    settings: dict[str, Any] = {
        "tokenizer": tokenizer, "tokens_ns": tokens_ns, "data": options.mmlu_data, "seed": options.seed,
        "batch": options.batch_size,
    }  # fmt: skip
    scores = {shown: score_function(name, **settings) for shown, name in names.items() if name != "kl"}

    # 2. The parent's predictions; then the parent makes room.
    if "kl" in names:
        assert tokens_ns is not None
        model = models.load(options.reference_hf_path)
        with progress_bar("the parent", len(tokens_ns), "sequences") as step:
            reference = Reference.of(
                model, tokens_ns, options.kl_positions, options.seed, options.batch_size, step
            )
        del model
        gc.collect()
        scores["kl"] = score_function("kl", reference=reference)

    # 3. The model.
    model = models.load(options.hf_path)
    results: dict[str, dict[str, Any]] = {}
    for shown in names:
        score, begin = scores[shown], time.monotonic()
        with progress_bar(shown, score.steps, score.unit, aside=not options.metrics) as step:
            found = score.estimate(model, step)
        results[shown] = {
            "value": found.mean, "se": found.se if math.isfinite(found.se) else None, "n": found.n,
            "of": score.counts, "seconds": round(time.monotonic() - begin, 2),
            "fingerprint": dict(score.fingerprint),
        }  # fmt: skip
        if shown == "loss":
            results[shown]["perplexity"] = math.exp(found.mean)
        if found.parts:
            results[shown]["by_subject"] = dict(found.parts)

    # 4. What was found.
    if options.metrics:
        show(options, results)
    elif runtime.rank() == 0:
        one = results["loss"]
        speed = tokens_ns.numel() / max(one["seconds"], 1e-9) if tokens_ns is not None else 0
        print(
            f"perplexity {one['perplexity']:.2f} (loss {one['value']:.4f} nats, {one['n']:,} predictions, "
            f"{speed:.0f} tokens/s)"
        )
    if options.output:
        write_json(Path(options.output), {
            "model": options.hf_path, "reference": options.reference_hf_path, "backend": models.name,
            "dtype": options.dtype, "layout": {k: runtime.size(k) for k in ("pp", "ep", "tp", "dp")},
            "data": options.data, "metrics": results,
        })  # fmt: skip
    return 0


def metrics(options: argparse.Namespace) -> dict[str, str]:
    """What the table calls each metric -> the name of its score function."""
    from mbridge_prune.evaluate.score_functions import check_name

    names = {}
    for shown in dict.fromkeys((options.metrics or "loss").split(",")):
        name = shown.strip()
        if name == "mmlu":
            if not 0 < options.mmlu_percentage <= 100:
                raise UserError(f"--mmlu-percentage {options.mmlu_percentage:g}: expected above 0, up to 100")
            shots = f"_{options.few_shot}shot" if options.few_shot else ""
            name = f"mmlu_{options.mmlu_percentage:g}pct{shots}_bs{options.batch_size}"
        elif name not in METRICS and ":" not in name and not name.startswith("mmlu_"):
            known = f"{', '.join(METRICS)}, module:function"
            raise UserError(f"--metrics: no metric {name!r}{nearest(name, METRICS)}; there are: {known}")
        check_name(name)
        names[shown.strip()] = name
    return names


def check_options(options: argparse.Namespace, names: dict[str, str]) -> None:
    """What can be refused without opening a model."""
    lowest = {
        "window": 2 + options.add_bos, "windows": 1, "few_shot": 0, "kl_positions": 1, "batch_size": 1,
        "seed": 0, "pp": 1, "ep": 1,
    }  # fmt: skip
    for name, least in lowest.items():
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    needing = [name for name in ("loss", "kl") if name in names]
    if needing and not options.data:
        raise UserError(f"{' and '.join(needing)} need text: give --data FILE")
    if options.data and not Path(options.data).is_file():
        raise UserError(f"no such text file: {options.data}")
    if "kl" in names and not options.reference_hf_path:
        raise UserError("kl is the distance from another model: give --reference-hf-path PARENT")
    if options.output and Path(options.output).exists():
        raise UserError(f"{options.output} exists; give another --output")
    if options.backend == "transformers" and max(options.pp, options.ep, options.tp) > 1:
        raise UserError("--backend transformers runs on one process: leave --pp, --ep and --tp out")


def open_models(options: argparse.Namespace, paths: Sequence[str]) -> Models:
    """The backend that the options ask for."""
    import torch

    from mbridge_prune.evaluate.models import Megatron, Transformers, known_to_bridge

    dtype, trust = getattr(torch, options.dtype), options.trust_remote_code
    if options.backend == "auto" and runtime.world_size() == 1 and not known_to_bridge(paths, trust):
        return Transformers(dtype, trust)
    if options.backend == "transformers":
        return Transformers(dtype, trust)
    return Megatron(options.pp, options.ep, options.tp, dtype, options.window, trust)


def load_tokenizer(options: argparse.Namespace) -> Any:
    from mbridge_prune.bridge.load import load_tokenizer

    tokenizer = load_tokenizer(options.hf_path, options.trust_remote_code)
    if tokenizer is None and options.reference_hf_path:
        tokenizer = load_tokenizer(options.reference_hf_path, options.trust_remote_code)
    return tokenizer


def text(options: argparse.Namespace, tokenizer: Any, vocab: int) -> Any:
    """[windows, window] int64 ids of --data."""
    from mbridge_prune.calibration.packing import calibration_tokens, load_tokens
    from mbridge_prune.calibration.text import TOKEN_SUFFIXES
    from mbridge_prune.evaluate.loss import windows

    path = Path(options.data)
    if path.suffix in TOKEN_SUFFIXES:
        return load_tokens(path, seq_length=options.window, vocab_size=vocab)[: options.windows]
    if tokenizer is None:
        raise UserError(f"{options.hf_path} has no tokenizer: give --data a token file (.npy, .safetensors)")
    if path.suffix in (".jsonl", ".parquet"):
        return calibration_tokens(
            path, tokenizer, options.windows, options.window, add_bos=options.add_bos, seed=options.seed,
            vocab_size=vocab,
        )  # fmt: skip
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path} as UTF-8 text: {error}") from error
    return windows(content, tokenizer, options.window, options.windows, options.add_bos)


def show(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """One table, on rank 0."""
    from rich.table import Table

    from mbridge_prune.report.console import console

    table = Table(title=str(options.hf_path))
    for column in ("", "value", "± s.e.", "over", "seconds"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for shown, found in results.items():
        error = "" if found["se"] is None else f"{found['se']:.4f}"
        unit = {"loss": "predictions", "kl": "positions"}.get(
            shown, "questions" if "mmlu" in shown else "calls"
        )
        over, seconds = f"{found['n']:,} {unit}", f"{found['seconds']:.1f}"
        label = {"loss": "loss (nats)", "kl": "kl (nats)"}.get(shown, shown)
        table.add_row(label, f"{found['value']:.4f}", error, over, seconds)
        if shown == "loss":
            error = "" if found["se"] is None else f"{found['perplexity'] * found['se']:.2f}"
            table.add_row("perplexity", f"{found['perplexity']:.2f}", error, over, "")
    console().print(table)


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
