"""A few questions in MMLU's form, and a tokenizer that writes them: bytes, and one token for each letter."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SUBJECTS = ("abstract_algebra", "anatomy", "world_religions")
TESTS, EXAMPLES = 12, 5


def tokenizer(letters: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level; " A" to " D" are one token each unless `letters` is False."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["</s>", *alphabet])}
    merges = [("Ġ", letter) for letter in "ABCD"] if letters else []
    for pair in merges:
        words["".join(pair)] = len(words)
    backend = Tokenizer(models.BPE(vocab=words, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def rows(subject: str, split: str, n: int) -> list[dict[str, object]]:
    draw = random.Random(f"{subject} {split}")
    word = lambda: "".join(draw.choices("abcdefgh", k=draw.randint(2, 7)))
    return [
        {
            "question": " ".join(word() for _ in range(draw.randint(3, 12))) + "?",
            "choices": [word() for _ in range(4)],
            "answer": draw.randrange(4),
            "subject": subject,
        }
        for _ in range(n)
    ]


def write(folder: Path, subjects: Sequence[str] = SUBJECTS, tests: int = TESTS) -> None:
    """`<subject>/test.jsonl` and `<subject>/dev.jsonl`."""
    for subject in subjects:
        (folder / subject).mkdir(parents=True)
        for split, n in (("test", tests), ("dev", EXAMPLES)):
            lines = [json.dumps(row) + "\n" for row in rows(subject, split, n)]
            (folder / subject / f"{split}.jsonl").write_text("".join(lines))


def stage(model: object) -> int | None:
    """A score function of a user's: a number on the last pipeline stage alone."""
    from mbridge_prune import runtime

    last = runtime.place("pp") == runtime.size("pp") - 1
    return 7 + runtime.place("pp") if last else None
