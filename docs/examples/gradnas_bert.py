"""GradNAS on a BERT classifier: half of the encoder's operations, every layer to a size of its own.

    python docs/examples/gradnas_bert.py --model runs/minilm-sst2 --output runs/minilm-sst2-half

The classifier is trained first where `--model` is not there (docs/examples/film_reviews.py).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from film_reviews import LENGTH, batches, classifier, told, train

import mbridge_prune as mbp
from mbridge_prune.demo_data import sst2_examples


def main(source: Path, output: Path, flops: str, examples: int, tune: int) -> None:
    model, tokenizer = classifier(source)
    train_set = sst2_examples("train")
    print("full model:", told(model, tokenizer))

    # Batches hold labels, so that the model computes its loss itself.
    model, plan = mbp.prune(
        model,
        mode="gradnas",
        constraints={"flops": flops},
        dummy_input={"input_ids": torch.full((1, LENGTH), 1)},
        config={
            "data_loader": list(batches(tokenizer, train_set[:examples], size=8)),
            "loss_func": lambda output, batch: output.loss,
        },
    )
    print("sizes:", {key: f"{size} of {plan.sizes_before[key]}" for key, size in plan.sizes_after.items()})
    print("pruned:", told(model, tokenizer))

    train(model, tokenizer, train_set[:tune], rate=5e-5)
    print(f"tuned on {tune} reviews:", told(model, tokenizer))

    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    again = mbp.from_pretrained(output)
    print("loaded again:", told(again, tokenizer))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--flops", default="50%")
    parser.add_argument("--examples", type=int, default=512, help="reviews that the scores are taken on")
    parser.add_argument("--tune", type=int, default=3000, help="reviews of the short fine-tuning")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(options.model, options.output, options.flops, options.examples, options.tune)
