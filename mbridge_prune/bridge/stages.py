"""How layers divide over pipeline stages, and what to set where they do not."""

from __future__ import annotations

import itertools
from typing import Any

from mbridge_prune.errors import UserError


def check_stages(provider: Any) -> None:
    """Refuses a number of pipeline stages, or a split, that the layers do not divide into."""
    stages, layers = provider.pipeline_model_parallel_size or 1, provider.num_layers
    first = getattr(provider, "num_layers_in_first_pipeline_stage", None)
    last = getattr(provider, "num_layers_in_last_pipeline_stage", None)
    middle = stages - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    uneven = (middle == 0 and rest) or (middle > 0 and (rest % middle or rest < middle))
    if middle < 0 or rest < 0 or uneven:
        given = {"first": first, "last": last}
        said = " and ".join(f"{n} in the {place}" for place, n in given.items() if n is not None)
        raise UserError(
            f"{layers} layers do not divide over {stages} pipeline stages{' with ' + said if said else ''}; "
            + split_that_works(layers, stages)
        )


def split_that_works(layers: int, stages: int) -> str:
    """What to set instead, in words: the split with the smallest largest stage."""
    if layers < stages:
        return f"use --pp {layers} at most"
    flags = ("--num-layers-in-first-pipeline-stage", "--num-layers-in-last-pipeline-stage")
    if layers % stages == 0:
        return f"leave {' and '.join(flags)} out: {layers // stages} layers a stage"
    splits = []
    for ends in itertools.chain(*(itertools.product(range(1, layers), repeat=n) for n in (1, 2))):
        middle, rest = stages - len(ends), layers - sum(ends)
        if (middle == 0 and rest == 0) or (middle > 0 and rest >= middle and rest % middle == 0):
            splits.append((max(*ends, rest // middle if middle else 0), len(ends), ends))
    _, _, ends = min(splits)
    sizes = " ".join(f"{flag} {n}" for flag, n in zip(flags, ends, strict=False))
    middle, rest = stages - len(ends), layers - sum(ends)
    return f"set {sizes}" + (f", which leaves {rest // middle} layers to every other stage" if middle else "")
