"""Heterogeneous pruning: every axis its own size. What FastNAS and GradNAS share.

A mode builds its slice table, in which every axis is a dimension of its own (`Axis.hparam == Axis.key`),
ranks the units, says what each axis alone loses at each of its sizes, and leaves the rest to this package:

    run = Heterogeneous("gradnas", table, constraints, forward, choices)    # costs, profile, limits
    sort(table, orders)                                                     # dynamic.sort
    drops = {axis key: {size: what the score loses}}                        # or sensitivity.measure(...)
    found = run.search(drops)                                               # bisection.search
    return model, run.cut(found, orders, config)                            # shrink, check, remember, Plan

`docs/heterogeneous.md` says what happens in each step. `saved.save` and `saved.restore` are `mbp.save` and
`mbp.restore`.
"""

from mbridge_prune.heterogeneous.bisection import Drops, Found, search
from mbridge_prune.heterogeneous.choices import Choices, choices_of
from mbridge_prune.heterogeneous.costs import Forward, ForwardCosts
from mbridge_prune.heterogeneous.run import Heterogeneous
from mbridge_prune.heterogeneous.saved import restore, save
from mbridge_prune.heterogeneous.sensitivity import measure

__all__ = [
    "Choices",
    "Drops",
    "Forward",
    "ForwardCosts",
    "Found",
    "Heterogeneous",
    "choices_of",
    "measure",
    "restore",
    "save",
    "search",
]
