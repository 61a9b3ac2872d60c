"""Spreads measurements over replicas, wave by wave: each wave is known everywhere before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from mbridge_prune import runtime
from mbridge_prune.errors import UserError

Thing = TypeVar("Thing")
Result = TypeVar("Result")


def waves(
    things: Sequence[Thing], measure: Callable[[Thing], Result], place: int, replicas: int
) -> Iterator[list[tuple[Thing, Result]]]:
    """Yields the (thing, result) pairs of a wave, on every rank, in order.

    Args:
        place: this rank's replica; each measures every `replicas`th thing. With one replica all ranks work on
            each thing together.

    Raises:
        UserError: what `measure` refuses on one rank is refused on every one.
    """
    for first in range(0, len(things), replicas):
        wave = list(enumerate(things[first : first + replicas]))
        mine = wave if replicas == 1 else wave[place : place + 1]
        measured: dict[int, Result] = {}
        refused: UserError | None = None
        try:
            measured = {number: measure(thing) for number, thing in mine}
        except UserError as error:
            refused = error
        told = runtime.gather_objects((measured, refused and str(refused)))
        for part, reason in reversed(told):  # where all measured the same, rank 0 says
            if reason:
                raise refused or UserError(reason)
            measured.update(part)
        yield [(thing, measured[number]) for number, thing in wave]
