"""HTML as values: text is escaped unless it was made here, so nothing a run contains can break a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

VOID = ("meta", "br", "hr", "col")
TEXTLESS = ("path", "line", "rect")
"""SVG shapes; closed by themselves when empty."""


class Html(str):
    """Markup; every other string is text."""

    __slots__ = ()


def text(content: object) -> Html:
    """Text as markup."""
    return content if isinstance(content, Html) else Html(escape(str(content)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Markup and text, one after the other; None is left out."""
    return Html(text(between).join(text(part) for part in parts if part is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        children: text, markup, or None (left out).
        attributes: a trailing `_` is dropped (`class_`), other `_` become `-`; None and False are left out,
            True is an attribute without a value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escape(str(value))}"')
    start = " ".join(words)
    if name in VOID:
        return Html(f"<{start}>")
    inside = join(children)
    if name in TEXTLESS and not inside:
        return Html(f"<{start}/>")
    return Html(f"<{start}>{inside}</{name}>")


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    caption: str,
    left: int = 1,
    class_: str | None = None,
) -> Html:
    """A table in a frame that scrolls sideways where the page is narrow.

    Args:
        caption: for readers who do not see the page.
        left: so many columns hold text; numbers are set right.
    """

    def cell(name: str, place: int, content: object) -> Html:
        scope = {"scope": "col"} if name == "th" else {}
        return tag(name, content, class_=None if place < left else "n", **scope)

    body = []
    for row in rows:
        first, *others = row
        cells = [tag("th", first, scope="row", class_=None if left else "n")]
        cells += [cell("td", place, content) for place, content in enumerate(others, 1)]
        body.append(tag("tr", *cells))
    top = tag("tr", *(cell("th", place, name) for place, name in enumerate(head)))
    return tag(
        "div",
        tag("table", tag("caption", caption), tag("thead", top), tag("tbody", *body), class_=class_),
        class_="scroll", tabindex="0", role="region", aria_label=caption,
    )  # fmt: skip


def numbers(summary: str, content: Html) -> Html:
    """A plot's numbers, folded away under it."""
    return tag("details", tag("summary", summary), content)


def code(name: object) -> Html:
    """A name of the program; a long one may break behind `_` and `.`."""
    return tag("code", Html(re.sub(r"([_.])(?=.)", r"\1<wbr>", escape(str(name)))))
