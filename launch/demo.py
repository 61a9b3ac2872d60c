"""The demo: the real SmolLM2-135M, pruned on two pipeline ranks of this machine, measured, let speak."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mbridge_prune import cli, demo_data
from mbridge_prune.config import Parser
from mbridge_prune.distill import prepare as prepare_data

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "What is the capital of France?"
WINDOW, WINDOWS = 512, 16


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="demo.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", default="output/demo", help="run folder (default: output/demo)")
    parser.add_argument("--distill", action="store_true", help="then distil it, for some minutes")
    parser.add_argument("settings", nargs="*", help="further settings, e.g. calibration.num_samples=64")
    options, more = parser.parse_known_args(list(arguments))
    steps = 4 if options.distill else 3

    print(f"1/{steps} real weights and texts (downloaded once)", flush=True)
    model, wiki, held_out = demo_data.smollm2(), demo_data.enwik8(), demo_data.wikitext2("test")

    print(f"2/{steps} prune on two pipeline ranks", flush=True)
    code = torchrun(
        "prune.py", "--recipe", "smollm2-135m", "--hf-path", model, "--calib-data", wiki,
        "--output", options.output, *options.settings, *more,
    )  # fmt: skip
    if code:
        return code
    shown = {"parent": model, "pruned": Path(options.output) / "hf"}
    if options.distill:
        print(f"3/{steps} distil it from its parent on two data-parallel ranks", flush=True)
        run = Path(f"{options.output}-distill")
        code = distil(model, shown["pruned"], wiki, run)
        if code:
            return code
        shown["distilled"] = run / "hf"

    print(
        f"{steps}/{steps} before and after, in plain transformers ({WINDOWS} x {WINDOW} tokens of WikiText-2)"
    )
    show({name: measure(path, held_out) for name, path in shown.items()})
    for path in list(shown.values())[1:]:
        print(f"the report: {path.parent}/report.html  (the model: {path})")
    return 0


def torchrun(script: str, *arguments: object) -> int:
    """Runs a command of launch/ in two processes."""
    starter, script = Path(sys.executable).with_name("torchrun"), str(ROOT / "launch" / script)
    command = [str(starter), "--nproc-per-node", "2", script, *map(str, arguments)]
    print("    torchrun " + " ".join(command[1:]), flush=True)
    quiet = "ignore::FutureWarning:torch.cuda"  # torch's notice about a package of Megatron's
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": quiet}
    return subprocess.run(command, env=env).returncode


def distil(teacher: Path, student: Path, wiki: Path, run: Path) -> int:
    """Makes indexed datasets of the text, once, and runs launch/distill.py."""
    data = run.with_name(f"{run.name}-data")
    for split in ("train", "validation"):
        if not (data / f"{split}.json").is_file():
            prepared = prepare_data.main(
                [
                    "--tokenizer",
                    str(teacher),
                    "--input",
                    str(wiki),
                    "--split",
                    split,
                    "--output",
                    f"{data}/{split}",
                ]
            )
            if prepared:
                return prepared
    return torchrun(
        "distill.py", "--recipe", "smollm2-135m", "--teacher", teacher, "--student", student,
        "--data", data / "train", "--valid-data", data / "validation", "--output", run,
    )  # fmt: skip


def measure(path: Path, text: Path) -> dict[str, str]:
    """Parameters, perplexity, speed and one answer of a Hugging Face model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mbridge_prune.evaluate.loss import loss, windows

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    result = loss(model, windows(text.read_text(encoding="utf-8"), tokenizer, WINDOW, WINDOWS))
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {
        "parameters": f"{model.num_parameters():,}",
        "perplexity": f"{result.perplexity:.2f}",
        "tokens a second": f"{result.tokens_per_second:.0f}",
        PROMPT: " ".join(answer.split()),
    }


def show(models: Mapping[str, Mapping[str, str]]) -> None:
    """A column a model, a row a number."""
    from rich.table import Table

    from mbridge_prune.report.console import console

    trained = "" if "distilled" in models else ", no training yet"
    table = Table(title=f"SmolLM2-135M{trained}")
    for column in ("", *models):
        table.add_column(column, overflow="fold")
    for name in next(iter(models.values())):
        table.add_row(name, *(numbers[name] for numbers in models.values()))
    console().print(table)


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
