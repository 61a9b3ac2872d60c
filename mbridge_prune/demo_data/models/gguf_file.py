"""Model and vocabulary of a GGUF file, which transformers reads but for its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of the format


@dataclass(frozen=True)
class Vocabulary:
    """Byte-pair vocabulary of a GGUF: token by id, type by id, merges in order, chat template."""

    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, ...]]
    chat_template: str

    def of_kind(self, kind: int) -> list[str]:
        return [token for token, own in zip(self.tokens, self.kinds, strict=True) if own == kind]


def read_gguf(path: Path) -> tuple[Any, Vocabulary]:
    """The model in fp32 and its vocabulary."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    fields = GGUFReader(path).fields
    vocabulary = Vocabulary(
        tokens=fields["tokenizer.ggml.tokens"].contents(),
        kinds=fields["tokenizer.ggml.token_type"].contents(),
        merges=[tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()],
        chat_template=fields["tokenizer.chat_template"].contents(),
    )
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.config.__dict__.pop("_model_name_or_path", None)
    return model, vocabulary
