"""Every weight that a wrapper declares, in every family: refitted as a direct solve on what it reads says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import models
import pytest
import torch
from matrix import PATTERNS, cuts, load
from models import tokens

import mbridge_prune as mbp
from mbridge_prune.dynamic import Consumer, SliceTable, Units
from mbridge_prune.importance.watch import watch
from mbridge_prune.mcore_minitron import table_of
from mbridge_prune.repair import Room, repair
from mbridge_prune.repair.solve import TOKENS

FAMILIES = [*models.CONFIGS, *PATTERNS]
SAMPLES, LENGTH, BATCH = 40, 48, 10
TEXT = tokens(SAMPLES, seed=23, length=LENGTH)
JUDGES = range(9, SAMPLES, 10)
Read = dict[str, dict[int, torch.Tensor]]
"""Consumer label -> sample -> [tokens, in] fp64."""


def observed(table: SliceTable) -> Read:
    """What every weight reads: each sample is run alone, so that all rows of a call are of it."""
    found: Read = {consumer.label: {} for _, consumer in table.consumers}

    def seer(consumer: Consumer) -> Callable[[torch.Tensor, tuple], None]:
        def see(x: torch.Tensor, args: tuple) -> None:
            found[consumer.label][sample] = consumer.reads(x, args).detach().flatten(0, -2).double()

        return see

    with ExitStack() as stack:
        for _, consumer in table.consumers:
            stack.enter_context(watch(consumer.seen, consumer.tensor, seer(consumer)))
        for sample in range(SAMPLES):
            mbp.CalibrationLoop(TEXT[sample : sample + 1])(table.model)
    return found


def scaled(consumer: Consumer, x_tn: torch.Tensor, in_: torch.Tensor) -> torch.Tensor:
    """[tokens, k]: what the cut weight reads: behind a norm, as normalised over the channels that stay."""
    if consumer.renorm is None:
        return x_tn[:, in_]
    gain, groups = consumer.renorm.module.weight.detach().double(), consumer.renorm.groups
    plain_tgc = (x_tn / gain)[:, in_].unflatten(1, (groups, -1))
    scale_tg1 = plain_tgc.square().mean(-1, keepdim=True).rsqrt()
    return (x_tn[:, in_].unflatten(1, (groups, -1)) * scale_tg1).flatten(1)


def solved(
    x_tn: torch.Tensor, cut_tk: torch.Tensor, weight: torch.Tensor, in_: torch.Tensor, ridge: float
) -> torch.Tensor:
    """[out, k]: by lstsq on the inputs themselves, with rows that pull to the plain slice."""
    plain = weight[:, in_]
    missing_to = x_tn @ weight.t() - cut_tk @ plain.t()
    pull = torch.diag((ridge * cut_tk.square().sum(0)).sqrt())
    rows = torch.cat([missing_to, missing_to.new_zeros(len(pull), len(weight))])
    return plain + torch.linalg.lstsq(torch.cat([cut_tk, pull]), rows).solution.t()


SEPARATE = ("gpt_oss", "qwen3_next", "nemotron_h_moe")
"""Families whose experts are tried as modules of their own, too."""


@pytest.mark.parametrize(
    ("family", "grouped"),
    [*((family, True) for family in FAMILIES), *((family, False) for family in SEPARATE)],
)
def test_every_declared_weight_is_refitted_on_what_it_reads(hf_folder, family, grouped):
    table = table_of(load(hf_folder(family), grouped).unwrapped_model)
    sizes = {k: n for k, n in cuts(family)["all"].items() if k != "num_layers"}
    kept, read = table.first(table.settle(sizes)), observed(table)
    before = {c.label: c.weight().detach().double() for _, c in table.consumers}
    records = repair(
        table,
        table.settle(sizes),
        None,
        lambda m: mbp.CalibrationLoop(TEXT, BATCH)(m),
        "least_squares",
        Room(),
    )
    of = {record["weight"]: record for record in records}

    touched = [c for _, c in table.consumers if stays(c, kept) and len(c.tree.entries(kept)) < c.tree.full()]
    assert sorted(of) == sorted(c.label for c in touched)
    rows = {(id(e.module), e.attribute): e.dims[0].entries(kept) for e in table.entries if e.dims}
    done = 0
    for _, consumer in table.consumers:
        label, weight = consumer.label, consumer.weight().detach().double()
        if label not in of or not of[label]["repaired"]:
            assert torch.equal(weight, before[label]), label
            continue
        out, in_ = rows[id(consumer.module), consumer.name], consumer.tree.entries(kept)
        x_tn = torch.cat([x for sample, x in read[label].items() if sample not in JUDGES])
        cut_tk, ridge = scaled(consumer, x_tn, in_), of[label]["ridge"]
        wanted = solved(x_tn, cut_tk, before[label][out], in_, ridge)
        close = dict(rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        torch.testing.assert_close(weight[out][:, in_], wanted, **close, msg=lambda m, n=label: f"{n}: {m}")
        assert of[label]["tokens"] == len(x_tn) >= TOKENS * len(in_)
        done += 1
    assert done > len(touched) / 4
    for label, record in of.items():
        if record.get("why", "").startswith("needs"):
            fitted = sum(len(x) for sample, x in read[label].items() if sample not in JUDGES)
            assert record["tokens"] == fitted < TOKENS * record["channels"][1]


def stays(consumer: Consumer, kept: Any) -> bool:
    unit = consumer.unit
    return unit is None or unit.number in Units(unit.axis).entries(kept).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_reads_units_is_declared(hf_folder, family):
    """But embeddings, which are looked up, and an output layer that is one."""
    table = table_of(load(hf_folder(family)).unwrapped_model)
    declared = {(id(consumer.module), consumer.name) for _, consumer in table.consumers}
    readers = [e for e in table.entries if len(e.dims) == 2 and list(e.dims[1].axes())]
    missing = {e.name for e in readers if (id(e.module), e.attribute) not in declared}
    assert not {name for name in missing if "embeddings" not in name and "output_layer" not in name}
    tower = getattr(table.model, "language_model", table.model)
    assert tower.share_embeddings_and_output_weights or not any("output_layer" in name for name in missing)
