"""A mean and how far to trust it, where neighbouring measurements are alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` measurements and its standard error (infinite where there is one cluster).

    Attributes:
        parts: means of named parts, where there are any (MMLU's subjects).
    """

    mean: float
    se: float
    n: int
    parts: Mapping[str, float] = field(default_factory=dict, repr=False)


def estimate(values: torch.Tensor, sequence: torch.Tensor | None = None) -> Estimate:
    """The mean and its cluster-robust standard error.

    Positions of one sequence are correlated: with G sequences, mean m and N values,
    se^2 = G / (G - 1) * sum_g (sum_{i in g} (x_i - m))^2 / N^2
    (Liang and Zeger 1986; as for evaluations in Miller, arXiv 2411.00640).

    Args:
        values: [sequences, positions], or [n] with `sequence`.
        sequence: [n] the sequence each value belongs to; None takes each row for one sequence.
    """
    if sequence is None:
        sequence = torch.arange(len(values)).repeat_interleave(values[0].numel())
    values, sequence = values.double().flatten().cpu(), sequence.flatten().cpu()
    n = len(values)
    mean = float(values.mean())
    _, cluster = sequence.unique(return_inverse=True)
    sums = torch.zeros(int(cluster.max()) + 1, dtype=torch.float64).index_add_(0, cluster, values - mean)
    clusters = len(sums)
    if clusters < 2:
        return Estimate(mean, math.inf, n)
    return Estimate(mean, math.sqrt(clusters / (clusters - 1) * float(sums.square().sum())) / n, n)


def paired(a: torch.Tensor, b: torch.Tensor, sequence: torch.Tensor | None = None) -> Estimate:
    """The mean of a - b with its standard error: both were measured at the same places.

    Arguments and formula as in `estimate`. Most of the spread is the text's and falls out of the difference.
    """
    return estimate(a.double() - b.double(), sequence)
