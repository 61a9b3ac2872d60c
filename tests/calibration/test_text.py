"""Documents come out whole and in order, and every bad source says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mbridge_prune.calibration.text import read_documents
from mbridge_prune.errors import UserError


class ChatTokenizer:
    """Stands for a tokenizer with a chat template."""

    chat_template = "x"

    def apply_chat_template(self, turns, tokenize):
        assert tokenize is False
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in turns)


def write_jsonl(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_txt_without_a_marker_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo <|endoftext|> three\n", encoding="utf-8")
    assert list(read_documents(path)) == ["one\n\ntwo <|endoftext|> three\n"]


def test_txt_splits_at_marker_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n<|endoftext|>\r\n\n<|endoftext|>\ntwo\n")
    assert list(read_documents(path)) == ["one\n", "two\n"]


def test_jsonl_and_parquet_give_the_same_documents(tmp_path):
    records = [{"body": "é one", "n": 1}, {"body": "  ", "n": 2}, {"body": "two", "n": 3}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", *records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for path in (jsonl, tmp_path / "a.parquet"):
        assert list(read_documents(path, text_key="body")) == ["é one", "two"]


def test_folder_is_sorted_and_recursive(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", {"text": "3"})
    write_jsonl(tmp_path / "a" / "z.jsonl", {"text": "1"}, {"text": "2"})
    (tmp_path / "notes.md").write_text("not read")
    assert list(read_documents(tmp_path)) == ["1", "2", "3"]


@pytest.mark.parametrize(("split", "expected"), [("train", ["1", "2"]), ("validation", ["3"])])
def test_folder_of_splits_never_mixes_them(tmp_path, split, expected):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", {"text": "1"})
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", {"text": "2"})
    write_jsonl(tmp_path / "valid" / "part.jsonl", {"text": "3"})
    write_jsonl(tmp_path / "test.jsonl", {"text": "held out"})
    (tmp_path / "README.txt").write_text("not a split")
    assert list(read_documents(tmp_path, split=split)) == expected


def test_chat_records_are_rendered(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    )
    rendered = list(read_documents(path, chat_template=True, tokenizer=ChatTokenizer()))
    assert rendered == ["[user]hi[assistant]yo", "[user]a[assistant]b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2: broken JSON"),
        ('{"text": "a"}\n\n{"txt": "b"}\n', r"line 3: no key 'text' \(did you mean 'txt'\?\)"),
        ('{"messages": []}\n', "line 1: no key 'text'; set chat_template=True"),
        ('{"text": 3}\n', "line 1: 'text' holds int"),
        ("[1]\n", "line 1: expected an object, found list"),
    ],
)
def test_broken_records_name_their_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_documents(path))


def test_chat_errors(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": "user"}]})
    with pytest.raises(UserError, match="line 1: cannot render 'messages'"):
        list(read_documents(path, chat_template=True, tokenizer=ChatTokenizer()))
    with pytest.raises(UserError, match="no chat template"):
        read_documents(path, chat_template=True, tokenizer=object())
    path = write_jsonl(tmp_path / "b.jsonl", {"text": "x"})
    with pytest.raises(UserError, match="line 1: no key 'messages' or 'conversations'"):
        list(read_documents(path, chat_template=True, tokenizer=ChatTokenizer()))


def test_bad_paths_fail_at_the_call(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", {"text": "x"})
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such file.*did you mean 'train.jsonl'"):
        read_documents(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="is not one of .txt, .jsonl, .parquet"):
        read_documents(tmp_path / "a.csv")
    with pytest.raises(UserError, match="holds no .txt"):
        read_documents(tmp_path / "empty")
    with pytest.raises(UserError, match="no split 'test'; it has: train"):
        read_documents(tmp_path, split="test")


def test_corrupt_files_are_one_line(tmp_path):
    for name in ("a.parquet", "a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00broken")
        with pytest.raises(UserError, match="cannot read") as caught:
            list(read_documents(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_dataset_name_is_streamed(monkeypatch):
    import datasets

    calls = []

    def load(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_documents("org/name:config-v1", split="test")) == ["a", "b"]
    assert calls == [("org/name", "config-v1", "test", True)]


def test_unreachable_dataset_says_to_give_a_path(monkeypatch):
    import datasets

    def load(*args, **kwargs):
        raise ConnectionError("no route\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match="no route; give the path of a local") as caught:
        list(read_documents("org/name"))
    assert "\n" not in str(caught.value)
