"""A GPT-J of 0.9 million parameters, trained on Wikipedia text: no package carries real GPT-J weights.

    python docs/examples/small_gptj.py --output runs/small-gptj

trains a byte-level BPE of 512 tokens and the model, on one core in some minutes.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

from mbridge_prune.demo_data import enwik8_articles

LENGTH, BATCH, RATE, STEPS = 128, 16, 3e-3, 200
log = logging.getLogger("small_gptj")


def tokenizer_of(articles: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose end-of-text token stands between articles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(articles, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=LENGTH
    )


def windows(tokenizer: PreTrainedTokenizerFast, articles: list[str]) -> torch.Tensor:
    """[windows, LENGTH] token ids, articles one after another."""
    encoded = tokenizer(articles, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor([token for text in encoded for token in (*text, tokenizer.eos_token_id)])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def train(folder: Path, steps: int, seed: int = 0) -> None:
    """Trains and writes model and tokenizer."""
    torch.manual_seed(seed)
    articles = enwik8_articles("train")[:600]
    tokenizer = tokenizer_of(articles[:400])
    model = GPTJForCausalLM(
        GPTJConfig(
            vocab_size=len(tokenizer), n_positions=LENGTH, n_embd=128, n_layer=4, n_head=8, n_inner=512,
            rotary_dim=8, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    run(model, windows(tokenizer, articles), steps, RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tune(model: Any, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int = 1) -> None:
    """Some more steps in place, on other text than the first ones saw."""
    torch.manual_seed(seed)
    run(model, windows(tokenizer, enwik8_articles("train")[600:900]), steps, RATE / 4)


def run(model: Any, data: torch.Tensor, steps: int, rate: float) -> None:
    """AdamW with a short warm-up and a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
    begin, order = time.monotonic(), torch.randperm(len(data))
    model.train()
    for step in range(steps):
        share = min((step + 1) / 40, 1) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate * share
        places = [order[i % len(order)] for i in range(step * BATCH, (step + 1) * BATCH)]
        batch = data[torch.stack(places)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            log.info(
                "step %d of %d: loss %.3f, %.0f s", step + 1, steps, loss.item(), time.monotonic() - begin
            )
    model.eval()


def text(tokenizer: PreTrainedTokenizerFast, split: str, sequences: int) -> torch.Tensor:
    """[sequences, LENGTH] ids, spread evenly over a split."""
    data = windows(tokenizer, enwik8_articles(split)[:400])
    return data[torch.linspace(0, len(data) - 1, sequences).long()]


def perplexity(model: Any, ids_ns: torch.Tensor) -> float:
    """Of next tokens, each sequence by itself."""
    model.eval()
    with torch.inference_mode():
        losses = [model(ids, labels=ids).loss.item() * len(ids) for ids in ids_ns.split(16)]
    return math.exp(sum(losses) / len(ids_ns))


def language_model(folder: Path, steps: int = STEPS) -> tuple[GPTJForCausalLM, PreTrainedTokenizerFast]:
    """The model of a folder and its tokenizer; trained first where the folder is not there."""
    if not folder.exists():
        train(folder, steps)
    return GPTJForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options.output, options.steps)
