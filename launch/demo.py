"""The demo: the real SmolLM2-135M, pruned on two pipeline ranks of this machine, measured, let speak."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mbridge_prune import cli, demo_data
from mbridge_prune.config import Parser

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "What is the capital of France?"
WINDOW, WINDOWS = 512, 16


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="demo.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", default="output/demo", help="run folder (default: output/demo)")
    parser.add_argument("settings", nargs="*", help="further settings, e.g. calibration.num_samples=64")
    options, more = parser.parse_known_args(list(arguments))

    print("1/3 real weights and texts (downloaded once)", flush=True)
    model, wiki, held_out = demo_data.smollm2(), demo_data.enwik8(), demo_data.wikitext2("test")

    print("2/3 prune on two pipeline ranks", flush=True)
    command = [
        str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2",
        str(ROOT / "launch" / "prune.py"), "--recipe", "smollm2-135m", "--hf-path", str(model),
        "--calib-data", str(wiki), "--output", options.output, *options.settings, *more,
    ]  # fmt: skip
    print("    torchrun " + " ".join(command[1:]), flush=True)
    quiet = "ignore::FutureWarning:torch.cuda"  # torch's notice about a package of Megatron's
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": quiet})
    if done.returncode:
        return done.returncode

    print(f"3/3 before and after, in plain transformers ({WINDOWS} x {WINDOW} tokens of WikiText-2)")
    before, after = measure(model, held_out), measure(Path(options.output) / "hf", held_out)
    show(before, after)
    print(f"the report: {options.output}/report.html  (the model: {options.output}/hf)")
    return 0


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


def show(before: dict[str, str], after: dict[str, str]) -> None:
    from rich.table import Table

    from mbridge_prune.report.console import console

    table = Table(title="SmolLM2-135M, no training yet")
    for column in ("", "before", "after"):
        table.add_column(column, overflow="fold")
    for name, value in before.items():
        table.add_row(name, value, after[name])
    console().print(table)


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
