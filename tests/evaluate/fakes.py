"""Models that answer by rule: what an evaluator must score exactly."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from mbridge_prune.evaluate.mmlu_prompts import Prompts

Rule = Callable[[list[int]], int]
"""The ids of a prompt -> the id that is the most likely next."""


class Fake(nn.Module):
    """Logits 1 for one id and 0 for the others, behind every position; Megatron's calling convention."""

    def __init__(self, rule: Rule, vocab: int = 320):
        super().__init__()
        self.rule, self.vocab, self.asked = rule, vocab, []
        self.config = SimpleNamespace(hidden_size=vocab, params_dtype=torch.float32)
        self.post_process = True
        self.output_layer = nn.Identity()

    def forward(self, input_ids, position_ids, attention_mask):
        self.asked.append(input_ids)
        hidden_sbv = torch.zeros(*input_ids.T.shape, self.vocab)
        for row, ids in enumerate(input_ids.tolist()):
            for last in range(len(ids)):
                hidden_sbv[last, row, self.rule(ids[: last + 1])] = 1
        return self.output_layer(hidden_sbv).transpose(0, 1)


def knows(asked: Prompts) -> Rule:
    """Says the right letter behind each whole prompt, and a wrong one anywhere else."""
    right = {tuple(p.ids): asked.letters[p.answer] for p in asked.prompts}
    wrong = {tuple(p.ids[:-1]): asked.letters[(p.answer + 1) % 4] for p in asked.prompts}
    return lambda ids: right.get(tuple(ids), wrong.get(tuple(ids), 5))


def always(token: int) -> Rule:
    return lambda ids: token
