"""Plots as inline SVG that keep their text size at every width of the page.

The drawing area is stretched to the page (`preserveAspectRatio="none"`, strokes unscaled), labels lie over
it as HTML at percentages. So one drawing serves a desktop and a phone, and colours follow the page's theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mbridge_prune.report.markup import Html, join, tag
from mbridge_prune.report.numbers import LESS, UNITS, significant

SIDE = 1000
"""The drawing area is SIDE x SIDE."""
BIG = {"k": 20}
"""Units that begin to be used later than at 1."""


class Scale(Protocol):
    """Where a value lies on an axis, from 0 to 1, and the values that are worth a label."""

    def at(self, value: float) -> float: ...

    def ticks(self) -> list[tuple[float, str]]: ...


@dataclass(frozen=True)
class Linear:
    """An axis of equal steps. `count` ticks at most, about."""

    low: float
    high: float
    count: int = 5
    big: bool = False
    """Labels as 134M, all in the unit of the largest."""

    def at(self, value: float) -> float:
        return (value - self.low) / ((self.high - self.low) or 1)

    def ticks(self) -> list[tuple[float, str]]:
        span = (self.high - self.low) or 1
        step = _nice(span / self.count)
        if self.big:
            step = math.ceil(step)  # sizes are whole
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        units = [(u, s) for u, s in UNITS if self.big and self.high >= s * BIG.get(u, 1)]
        unit, size = units[0] if units else ("", 1.0)
        places = max(0, -math.floor(math.log10(step / size) + 1e-9))
        places += round(step / size, places) != round(step / size, places + 1)  # 0.25, 2.5
        return [
            (n * step, f"{n * step / size:,.{places}f}{unit if n else ''}".replace("-", LESS))
            for n in range(first, last + 1)
        ]


@dataclass(frozen=True)
class Log:
    """An axis of equal ratios; what is below `low` lies on it."""

    low: float
    high: float

    def at(self, value: float) -> float:
        span = math.log(self.high / self.low) or 1
        return max(math.log(max(value, self.low) / self.low) / span, 0.0)

    def ticks(self) -> list[tuple[float, str]]:
        decades = math.log10(self.high / self.low)
        steps = (1,) if decades > 3 else (1, 3) if decades > 1.6 else (1, 2, 5)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = max(1, round(len(powers) / 6)) if decades > 5 else 1
        values = [s * 10.0**p for p in powers[::every] for s in steps]
        inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
        if len(inside) < 2:
            return Linear(self.low, self.high, 3).ticks()
        return [(v, significant(v, 1)) for v in inside]


@dataclass(frozen=True)
class Bands:
    """One column (or row) for each name, side by side; values are places."""

    names: Sequence[str]

    def at(self, value: float) -> float:
        return (value + 0.5) / (len(self.names) or 1)

    def left(self, place: float) -> float:
        return place / (len(self.names) or 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Every name while there are few, then every 5th or 10th layer; names that are no number always."""
        n = len(self.names)
        every = 1 if n <= 16 else 5 if n <= 70 else 10
        return [
            (place, name)
            for place, name in enumerate(self.names)
            if not name.isdigit() or int(name) % every == 0
        ]


def spread(values: Iterable[float], log: bool | None = None) -> Linear | Log:
    """A scale that holds all values with some air; logarithmic where they differ by more than 8 times."""
    seen = sorted(v for v in values if math.isfinite(v))
    if not seen:
        return Linear(0, 1)
    low, high = seen[0], seen[-1]
    positive = next((v for v in seen if v > 0), 0)
    if positive and log is not False and (log or high / positive > 8) and high > positive:
        low = max(positive, high / 1e6)
        air = (high / low) ** 0.05
        return Log(low / air, high * air)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1
    return Linear(low - air if low < 0 or low > air else 0, high + air)


def from_zero(values: Iterable[float]) -> Linear:
    """A scale for bars."""
    return Linear(0, max(values, default=1) * 1.06 or 1)


def sizes(values: Sequence[float]) -> Linear:
    """A scale for parameters."""
    low, high = min(values), max(values)
    air = (high - low) * 0.05 or high * 0.05 or 1
    return Linear(low - air, high + air, 4, big=True)


def _nice(step: float) -> float:
    """The nearest of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda nice: abs(math.log(nice / step)))


def _n(share: float) -> str:
    """A coordinate of the drawing area."""
    return f"{share * SIDE:.1f}".removesuffix(".0")


def _percent(share: float) -> str:
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + "%"


class Plot:
    """A plot in the making: shapes under labels. Shapes of one class are one path."""

    def __init__(self, x: Scale, y: Scale, height: int, x_title: str = "", y_title: str = "",
                 y_down: bool = False):  # fmt: skip
        """`y_down`: the first row is the top one."""
        self.x, self.y, self.height = x, y, height
        self.x_title, self.y_title, self.y_down = x_title, y_title, y_down
        self.shapes: list[Html] = []
        self.over: list[Html] = []

    def fx(self, x: float) -> float:
        return self.x.at(x)

    def fy(self, y: float) -> float:
        return self.y.at(y) if self.y_down else 1 - self.y.at(y)

    def side(self, place: float) -> float:
        """Where a column begins, of a plot with one column a layer; `place` may lie within one."""
        assert isinstance(self.x, Bands)
        return self.x.left(place)

    def box(self, left: float, top: float, right: float, bottom: float) -> str:
        """A rectangle as path data; sides are shares of the area."""
        a, b = _n(left), _n(top)
        w, h = round((right - left) * SIDE, 1), round((bottom - top) * SIDE, 1)
        return f"M{a} {b}h{w:g}v{h:g}h{-w:g}z"

    def shape(self, data: Iterable[str], class_: str, title: str | None = None) -> None:
        """A path; `title` is what a pointer that rests on it is told."""
        d = "".join(data)
        if d:
            self.shapes.append(tag("path", tag("title", title) if title else None, d=d, class_=class_))

    def dots(self, points: Iterable[tuple[float, float]], class_: str, title: str | None = None) -> None:
        """Round or square marks: strokes without length keep their form however the area is stretched."""
        self.shape((f"M{_n(self.fx(x))} {_n(self.fy(y))}h0" for x, y in points), f"dot {class_}", title)

    def line(self, points: Iterable[tuple[float, float]], class_: str) -> None:
        steps = [f"{_n(self.fx(x))} {_n(self.fy(y))}" for x, y in points]
        self.shape(["M" + "L".join(steps)] if len(steps) > 1 else [], f"line {class_}")

    def lines(self, ends: Iterable[tuple[float, float, float, float]], class_: str) -> None:
        """Straight pieces (x1, y1, x2, y2)."""
        self.shape(
            (f"M{_n(self.fx(a))} {_n(self.fy(b))}L{_n(self.fx(c))} {_n(self.fy(d))}" for a, b, c, d in ends),
            f"line {class_}",
        )

    def column(self, place: float, class_: str, title: str | None = None) -> None:
        """Something that fills a whole column of a banded x axis, over the shapes."""
        style = f"left:{_percent(self.side(place))};width:{_percent(self.side(1))}"
        self.over.append(tag("i", class_=class_, style=style, title=title))

    def mark(self, x: float, y: float, class_: str, title: str | None = None) -> None:
        """A mark of the style sheet, of fixed form."""
        style = f"left:{_percent(self.fx(x))};top:{_percent(self.fy(y))}"
        self.over.append(tag("i", class_=f"mark {class_}", style=style, title=title))

    def label(self, x: float, y: float, words: str, class_: str = "") -> None:
        """Text beside a point; classes `left`, `up`, `down` say on which side."""
        style = f"left:{_percent(self.fx(x))};top:{_percent(self.fy(y))}"
        self.over.append(tag("span", words, class_=f"at {class_}".strip(), style=style))

    def html(self, alt: str) -> Html:
        """The finished plot; `alt` is what it shows, in words."""
        y_ticks = [(self.fy(v), name) for v, name in self.y.ticks() if -0.001 <= self.fy(v) <= 1.001]
        x_ticks = [(self.fx(v), name) for v, name in self.x.ticks() if -0.001 <= self.fx(v) <= 1.001]
        grid = []
        if not isinstance(self.y, Bands):
            grid.append(tag("path", d="".join(f"M0 {_n(f)}h{SIDE}" for f, _ in y_ticks), class_="grid"))
        if not isinstance(self.x, Bands):
            grid.append(tag("path", d="".join(f"M{_n(f)} 0v{SIDE}" for f, _ in x_ticks), class_="grid"))
        area = tag(
            "svg", *grid, *self.shapes,
            viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", focusable="false",
        )  # fmt: skip
        labels = [tag("span", name, class_="yt", style=f"top:{_percent(f)}") for f, name in y_ticks]
        labels += [tag("span", name, class_="xt", style=f"left:{_percent(f)}") for f, name in x_ticks]
        widest = max((len(name) for _, name in y_ticks), default=0)
        style = f"--h:{self.height}px;--y:{max(3.2, 0.9 + widest * 0.56):.1f}em"
        if isinstance(self.x, Bands):
            style += f";--cols:{len(self.x.names)}"
        title = tag("span", self.y_title, class_="ytitle") if self.y_title else None
        below = tag("span", self.x_title, class_="xtitle") if self.x_title else None
        drawing = tag("div", area, *labels, *self.over, class_="area")
        banded = " banded" if isinstance(self.x, Bands) else ""
        return tag("div", title, drawing, below, class_=f"plot{banded}", style=style, role="img",
                   aria_label=alt)  # fmt: skip


def legend(*entries: tuple[str, str]) -> Html:
    """(class of the swatch, words), in a line above a plot."""
    items = (tag("li", tag("i", class_=f"key {swatch}"), words) for swatch, words in entries)
    return tag("ul", *items, class_="legend")


def figure(title: object, said: object, *parts: object, class_: str | None = None) -> Html:
    """A plot with its heading and how to read it."""
    return tag("figure", tag("figcaption", tag("h3", title), tag("p", said)), join(parts), class_=class_)
