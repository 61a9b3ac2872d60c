"""How far a candidate's predictions are from the full model's: KL(full || candidate), or in their logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.calibration.packing import token_fingerprint
from mbridge_prune.errors import UserError
from mbridge_prune.evaluate.estimate import Estimate, estimate, paired
from mbridge_prune.evaluate.forward import Places, Progress, combine, each_logits, is_transformers

__all__ = ["Estimate", "Reference", "estimate", "paired"]

CHUNK = 128
"""Positions whose distributions stand in fp32 at a time."""
LOWEST = -60000.0
"""The fp16 floor of a log-probability: exp() of it is 0, and 0 times it is no NaN."""


@dataclass(eq=False)
class Reference:
    """The full model's predictions at a random sample of positions.

    Kept on the last stage of every replica, and nowhere else: positions x vocabulary x 2 bytes (2048
    positions of a vocabulary of 151,936: 0.62 GB). Kept are logits less their maximum, in fp16: a
    log-probability x below the most likely token's is rounded by at most |x| / 2048. What is read back is
    normalised again, so it is a distribution, KL is never negative beyond fp32 rounding, and the full
    model itself scores 0 to second order in that error (about 1e-7 nats).

    Attributes:
        tokens_ns: the text.
        sequence: [positions] int64, the sequence each position lies in, ascending: for `paired`.
        fingerprint: of text and sample.
    """

    tokens_ns: torch.Tensor
    sequence: torch.Tensor
    column: torch.Tensor
    batch: int
    fingerprint: dict[str, str | int]
    log_p: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokens_ns: torch.Tensor,
        positions: int = 2048,
        seed: int = 0,
        batch: int = 1,
        progress: Progress | None = None,
    ) -> Reference:
        """Runs the full model once, its microbatches dealt out to the data-parallel ranks.

        Args:
            model, tokens_ns, batch: as in `token_losses`.
            positions: how many, as evenly over the sequences as they divide; all where there are no more.
            seed: of the sample.
        """
        rows, columns = sample(len(tokens_ns), tokens_ns.shape[1], positions, seed)
        facts: dict[str, str | int] = {
            "tokens": token_fingerprint(tokens_ns), "positions": len(rows), "seed": seed
        }  # fmt: skip
        reference = cls(tokens_ns, rows, columns, batch, facts)
        pieces: dict[int, torch.Tensor] = {}

        def take(first: int, logits_kv: torch.Tensor) -> None:
            top_k1 = logits_kv.float().amax(-1, keepdim=True)
            pieces[first] = (logits_kv.float() - top_k1).clamp_(min=LOWEST).half()

        each_logits(model, tokens_ns, batch, take, places=reference._places, progress=progress)
        if is_transformers(model) or runtime.place("pp") == runtime.size("pp") - 1:
            reference.log_p = reference._assemble(pieces, 1 if is_transformers(model) else runtime.size("dp"))
        return reference

    def kl(
        self,
        model: nn.Module,
        samples: int | None = None,
        deal: bool = True,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """KL(full || candidate) in nats at every position, over the whole vocabulary.

        Args:
            model: the candidate, laid out over the same stages as the full model was.
            samples: the first so many sequences alone.
            deal: as in `token_losses`.

        Returns:
            [positions] fp32 (those of the first `samples` sequences), the same on every rank; the same
            bit for bit under any pipeline and data parallel layout.
        """

        def divergence(log_p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            p, q = log_p.log_softmax(-1), logits.log_softmax(-1)
            return (p.exp() * (p - q.clamp(min=LOWEST))).sum(-1)

        return self._compared(model, divergence, samples, deal, progress)

    def logit_error(
        self,
        model: nn.Module,
        samples: int | None = None,
        deal: bool = True,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """||candidate - full||^2 / ||full||^2 of the logits at every position; the rest is as of `kl`.

        The mean over the vocabulary is taken off either first: to add one number to all logits of a position
        changes no prediction, and changes nothing here.
        """

        def error(log_p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            full, other = (each - each.mean(-1, keepdim=True) for each in (log_p, logits))
            return (other - full).square().sum(-1) / full.square().sum(-1).clamp(min=1e-30)

        return self._compared(model, error, samples, deal, progress)

    def _compared(
        self,
        model: nn.Module,
        measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        samples: int | None,
        deal: bool,
        progress: Progress | None,
    ) -> torch.Tensor:
        """[positions] fp32 of `measure(full model's, candidate's)`, logits [k, vocab] fp32 up to a shift."""
        tokens_ns = self.tokens_ns[:samples]
        found_p = torch.zeros(int((self.sequence < len(tokens_ns)).sum()), device=runtime.device())

        def take(first: int, logits_kv: torch.Tensor) -> None:
            assert self.log_p is not None
            begin = self._begin(first)
            if logits_kv.shape[-1] != self.log_p.shape[-1]:
                raise UserError(
                    f"the candidate has a vocabulary of {logits_kv.shape[-1]}, the full model of "
                    f"{self.log_p.shape[-1]}: their predictions cannot be compared"
                )
            for at in range(0, len(logits_kv), CHUNK):
                logits = logits_kv[at : at + CHUNK].float()
                places = slice(begin + at, begin + at + len(logits))
                found_p[places] = measure(self.log_p[places].to(logits.device).float(), logits)

        each_logits(model, tokens_ns, self.batch, take, places=self._places, deal=deal, progress=progress)
        return combine(model, found_p, deal)

    def _begin(self, sample: int) -> int:
        """How many positions lie before a sequence."""
        return int((self.sequence < sample).sum())

    def _places(self, first: int, last: int) -> Places:
        part = slice(self._begin(first), self._begin(last))
        return self.sequence[part] - first, self.column[part]

    def _assemble(self, pieces: dict[int, torch.Tensor], replicas: int) -> torch.Tensor:
        """[positions, vocab] fp16 out of every replica's microbatches."""
        vocab = max((piece.shape[-1] for piece in pieces.values()), default=0)
        if replicas > 1:  # one of them may have had no microbatch
            vocab = max(runtime.gather_objects(vocab, "dp"))
        whole = torch.zeros(len(self.sequence), vocab, dtype=torch.half, device=runtime.device())
        for first in list(pieces):
            begin = self._begin(first)
            piece = pieces.pop(first)
            whole[begin : begin + len(piece)] = piece
        if replicas > 1:
            group = runtime.group("dp")
            ranks = dist.get_process_group_ranks(group)
            for number, first in enumerate(range(0, len(self.tokens_ns), self.batch)):
                part = whole[self._begin(first) : self._begin(first + self.batch)].view(torch.uint8)
                if part.numel():
                    dist.broadcast(part, src=ranks[number % replicas], group=group)
        return whole


def sample(sequences: int, length: int, positions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random sample of places: (sequence, position) of each, [positions] int64, in order.

    Every sequence gets its own draw and as many places as any other, but for one.
    """
    if positions < 1:
        raise UserError(f"positions={positions}, expected at least 1")
    rows, columns = [], []
    for row in range(sequences):
        wanted = min((row + 1) * positions // sequences - row * positions // sequences, length)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
        columns.append(torch.randperm(length, generator=generator)[:wanted].sort().values)
        rows.append(torch.full((wanted,), row))
    return torch.cat(rows), torch.cat(columns)
