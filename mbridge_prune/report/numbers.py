"""How numbers are said: short, with the digits that matter, the same everywhere on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

LESS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
JOIN = "\N{WORD JOINER}"
GAP = "\N{NO-BREAK SPACE}"
"""Between a number and what it counts in: they stay on one line."""


UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def exact(n: float) -> str:
    """1,234,567"""
    return f"{n:,.0f}"


def short(n: float) -> str:
    """134.5M, 6.02B, 512; below 10,000 as it is."""
    for unit, size in UNITS:
        if abs(n) >= size * (0.9995 if unit != "k" else 10):
            digits = 1 if abs(n) >= 99.95 * size else 2
            return f"{n / size:.{digits}f}{unit}"
    return f"{n:,.0f}" if float(n).is_integer() else significant(n)


def significant(x: float, digits: int = 3) -> str:
    """A measured value: 0.0263, 3.41, 38.7, 1,240"""
    if x == 0 or not math.isfinite(x):
        return "0" if x == 0 else str(x)
    power = math.floor(math.log10(abs(x)))
    if power >= digits:
        return f"{x:,.0f}"
    if power < -4:
        return f"{x:.{digits - 1}e}"
    return f"{x:.{max(digits - 1 - power, 0)}f}".replace("-", LESS)


def rounded(x: float, places: int = 2) -> str:
    return f"{x:.{places}f}".replace("-", LESS)


def with_error(x: float, se: float | None, digits: int = 3) -> str:
    """0.512 ± 0.008: as many places as the error's first digit needs (two if it is a 1), else `digits`."""
    if se is None or not math.isfinite(se) or se <= 0:
        return f"{x:.{digits}f}".replace("-", LESS)
    power = math.floor(math.log10(se))
    places = min(max(-power + (round(se / 10.0**power, 3) < 2), 0), 6)
    return f"{x:.{places}f}{GAP}±{GAP}{se:.{places}f}".replace("-", LESS)


def share(part: float, whole: float) -> str:
    """68.1 %"""
    return f"{100 * part / whole:.1f}{GAP}%" if whole else DASH


def change(before: float, after: float) -> str:
    """−31.9 %; "unchanged" where nothing moved."""
    if before == after:
        return "unchanged"
    if not before:
        return "new"
    percent = 100 * (after / before - 1)
    return f"{LESS if percent < 0 else '+'}{abs(percent):.1f}{GAP}%"


def duration(seconds: float) -> str:
    """2.4 s, 3 min 20 s, 2 h 05 min"""
    if seconds < 0.095:
        return f"{seconds:.2f}{GAP}s"
    if seconds < 99.95:
        return f"{seconds:.1f}{GAP}s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}{GAP}min {rest:02d}{GAP}s"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours}{GAP}h {rest:02d}{GAP}min"


def ranges(numbers: Iterable[int]) -> str:
    """0–3, 5, 8–9"""
    out: list[list[int]] = []
    for n in sorted(numbers):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(
        str(a) if a == b else f"{a}{DASH}{JOIN}{b}" if b > a + 1 else f"{a}, {b}" for a, b in out
    )


def counted(n: int, one: str, many: str | None = None) -> str:
    """1 layer, 4 layers"""
    return f"{n:,}{GAP}{one if n == 1 else many or one + 's'}"


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    values_n = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(values_n, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where one side does not vary."""
    ra, rb = ranks(a), ranks(b)
    if len(ra) < 2 or ra.std() == 0 or rb.std() == 0:
        return None
    return float(np.corrcoef(ra, rb)[0, 1])
