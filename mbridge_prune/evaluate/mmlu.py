"""MMLU: the share of multiple-choice questions that a model answers right.

The answer is read at the prompt's last position alone: the largest of the logits of " A", " B", " C" and
" D" (Hendrycks et al. 2021, arXiv 2009.03300).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.evaluate.forward import Places, Progress, combine, each_logits, is_transformers
from mbridge_prune.evaluate.mmlu_data import SUBJECTS
from mbridge_prune.evaluate.mmlu_prompts import Prompts, prompts
from mbridge_prune.evaluate.shared_prefix import cannot_share, shared_prefix


@dataclass(frozen=True)
class Accuracy:
    """The share of right answers over `n` questions, its standard error, and each subject's share."""

    value: float
    se: float
    n: int
    by_subject: dict[str, float]


def mmlu(
    model: nn.Module,
    tokenizer: Any,
    percentage: float = 0.1,
    few_shot: int = 0,
    batch_size: int = 1,
    data: str | Path | None = None,
    seed: int = 0,
    *,
    subjects: Sequence[str] = SUBJECTS,
    deal: bool = True,
) -> Accuracy:
    """Scores a model on a random share of every subject's test questions.

    Args:
        model: as in `token_losses`.
        tokenizer, percentage, few_shot, data, seed, subjects: as in `prompts`.
        batch_size, deal: as in `answer`.

    Raises:
        UserError: whatever `prompts` refuses.
    """
    return answer(model, prompts(tokenizer, percentage, few_shot, data, seed, subjects), batch_size, deal)


def answer(
    model: nn.Module,
    asked: Prompts,
    batch_size: int = 1,
    deal: bool = True,
    share: bool = True,
    progress: Progress | None = None,
) -> Accuracy:
    """Scores a model on prepared prompts. The result is the same on every rank and in every layout.

    Prompts of about the same length share a batch, filled up on the right, where causal layers never
    look. With few-shot examples, the tokens that all prompts of a subject begin with run once (`share`,
    models of plain causal self-attention: see `cannot_share`); zero-shot prompts share but a short
    header and run whole. The output layer runs at the last positions only.

    The mean is over questions, as in the paper's code. Letters that tie for the largest logit share the
    point (half precision ties often; taking the first would favour A). The standard error is that of a
    random sample of questions.

    Args:
        batch_size: prompts a microbatch.
        deal: as in `token_losses`.
        progress: called with the number of questions done.
    """
    answers = torch.tensor([prompt.answer for prompt in asked.prompts])
    points_n = torch.zeros(len(asked.prompts), device=runtime.device())
    letters = torch.tensor(asked.letters, device=runtime.device())
    share = share and asked.few_shot > 0 and cannot_share(model) is None
    turn = 0
    for group in _by_subject(asked) if share else [list(range(len(asked.prompts)))]:
        begin = _common([asked.prompts[i].ids for i in group]) if share and len(group) > 1 else []
        rest = {i: asked.prompts[i].ids[len(begin) :] for i in group}
        longest = max(map(len, rest.values()))
        behind = shared_prefix(model, torch.tensor(begin), batch_size, longest) if begin else nullcontext()
        with behind:
            for batch in _mine(model, rest, batch_size, deal, turn, progress):
                _ask(model, batch, letters, answers, points_n)
        turn += -(-len(group) // batch_size)
    points_n = combine(model, points_n, deal).double().cpu()
    n = len(points_n)
    se = float(points_n.std()) / math.sqrt(n) if n > 1 else math.inf
    return Accuracy(float(points_n.mean()), se, n, {
        asked.prompts[group[0]].subject: float(points_n[group].mean()) for group in _by_subject(asked)
    })  # fmt: skip


@dataclass(frozen=True)
class _Batch:
    """Prompts of one microbatch: [b, s] ids filled up with 0, each one's last position, and its number."""

    tokens_bs: torch.Tensor
    last_b: torch.Tensor
    numbers: list[int]


def _by_subject(asked: Prompts) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, prompt in enumerate(asked.prompts):
        groups.setdefault(prompt.subject, []).append(number)
    return list(groups.values())


def _common(ids: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with, less their last token, which must be computed."""
    return list(commonprefix([list(i) for i in ids]))[: min(map(len, ids)) - 1]


def _mine(
    model: nn.Module, ids: dict[int, list[int]], size: int, deal: bool, turn: int, progress: Progress | None
) -> Iterator[_Batch]:
    """This rank's batches; which prompts meet in a batch depends on `size` alone.

    `turn` is the number of batches dealt before: where the dealing goes on.
    """
    order = sorted(ids, key=lambda number: (-len(ids[number]), number))  # what does not fit fails first
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    dealt = deal and not is_transformers(model)
    replicas = runtime.size("dp") if dealt else 1
    replica = (runtime.place("dp") - turn) % replicas if dealt else 0
    together = replicas > 1 and runtime.size("ep") > 1
    for at in range(0, len(batches), replicas):
        now = batches[at : at + replicas]
        mine = now[replica] if replica < len(now) else []
        if together:  # expert-parallel ranks meet in every layer: each runs a batch of the same shape
            rows, width = size, max(len(ids[number]) for batch in now for number in batch)
        else:
            rows, width = len(mine), max((len(ids[number]) for number in mine), default=0)
        if rows:
            tokens_bs = torch.zeros(rows, width, dtype=torch.long)
            for row, number in enumerate(mine):
                tokens_bs[row, : len(ids[number])] = torch.tensor(ids[number])
            last_b = torch.tensor([len(ids[number]) - 1 for number in mine] + [0] * (rows - len(mine)))
            yield _Batch(tokens_bs, last_b, mine)
        if progress is not None:
            progress(sum(map(len, now)))


def _ask(
    model: nn.Module, batch: _Batch, letters: torch.Tensor, answers: torch.Tensor, points_n: torch.Tensor
) -> None:
    def last(first: int, past: int) -> Places:
        return torch.arange(len(batch.last_b)), batch.last_b

    def take(first: int, logits_bv: torch.Tensor) -> None:
        of_letters_b4 = logits_bv[: len(batch.numbers), letters]
        best_b4 = (of_letters_b4 == of_letters_b4.amax(-1, keepdim=True)).float()
        right_b1 = answers[batch.numbers].to(best_b4.device).unsqueeze(1)
        points_n[batch.numbers] = best_b4.gather(1, right_b1).squeeze(1) / best_b4.sum(-1)

    each_logits(model, batch.tokens_bs, len(batch.tokens_bs), take, places=last, deal=False)
