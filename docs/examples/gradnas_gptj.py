"""GradNAS on a GPT-J language model: perplexity before, after, and after a short fine-tuning.

    python docs/examples/gradnas_gptj.py --model runs/small-gptj --output runs/small-gptj-70

The model is trained first where `--model` is not there (docs/examples/small_gptj.py).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from small_gptj import LENGTH, language_model, perplexity, text, tune

import mbridge_prune as mbp


def main(source: Path, output: Path, flops: str, sequences: int, steps: int) -> None:
    model, tokenizer = language_model(source)
    calibration, held_out = text(tokenizer, "train", sequences), text(tokenizer, "validation", 128)
    print(f"full model: perplexity {perplexity(model, held_out):.2f}")

    model, plan = mbp.prune(
        model,
        mode="gradnas",
        constraints={"flops": flops},
        dummy_input=torch.zeros(1, LENGTH, dtype=torch.long),
        config={
            "data_loader": [{"input_ids": ids, "labels": ids} for ids in calibration.split(4)],
            "loss_func": lambda output, batch: output.loss,
        },
    )
    print("sizes:", {key: f"{size} of {plan.sizes_before[key]}" for key, size in plan.sizes_after.items()})
    print(f"pruned: perplexity {perplexity(model, held_out):.2f}")

    tune(model, tokenizer, steps)
    print(f"tuned for {steps} steps: perplexity {perplexity(model, held_out):.2f}")

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"loaded again: perplexity {perplexity(mbp.from_pretrained(output), held_out):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--flops", default="70%")
    parser.add_argument("--sequences", type=int, default=128, help="sequences that the scores are taken on")
    parser.add_argument("--steps", type=int, default=50, help="of the short fine-tuning")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(options.model, options.output, options.flops, options.sequences, options.steps)
