"""Text becomes an indexed dataset that holds the tokenizer's own ids, document for document."""

from __future__ import annotations

import json

import pytest
from commands import running
from end_to_end.conftest import refused

from mbridge_prune.distill import prepare as preparing

TEXTS = ["w5 w6 w7", "w8", "w9 w10"]


@pytest.fixture
def prepare(capsys):
    with running("prepare_data", capsys) as call:
        yield call


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_documents_and_their_ends(site, text, tmp_path, prepare):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    said = prepare("--tokenizer", site / "teacher", "--input", text, "--output", tmp_path / "out" / "d")
    assert said.code == 0 and "3 documents, 9 tokens" in said.out, said
    data = IndexedDataset(str(tmp_path / "out" / "d"))
    assert [data[i].tolist() for i in range(3)] == [[5, 6, 7, 2], [8, 2], [9, 10, 2]]
    assert len(data.document_indices) == 4
    note = json.loads((tmp_path / "out" / "d.json").read_text())
    assert note["tokens"] == 9 and note["eod"] == 2 and note["input"] == str(text)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_another_end_of_document(site, text, tmp_path, prepare):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    words = ("--tokenizer", site / "teacher", "--input", text, "--output", tmp_path / "d")
    assert prepare(*words, "--eod", "<unk>").code == 0
    data = IndexedDataset(str(tmp_path / "d"))
    assert data[1].tolist() == [8, 0]
    assert "exists; give another --output" in refused(prepare(*words))


def documents(prefix) -> list[tuple[int, ...]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data = IndexedDataset(str(prefix))
    return [tuple(data[i].tolist()) for i in range(len(data))]


def test_a_share_of_the_documents_is_kept_aside(site, tmp_path, prepare, monkeypatch):
    """Whole documents, each on one side, drawn by the seed alone; the log says how far it is."""
    monkeypatch.setattr(preparing, "SECONDS_BETWEEN_LINES", 0)
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"w{i // 100 + 3} w{i % 100 + 3}"}) + "\n" for i in range(400))
    )
    words = ("--tokenizer", site / "teacher", "--input", text, "--valid-share", 0.1, "--output")
    said = prepare(*words, tmp_path / "d")
    assert said.code == 0 and "64 documents, 192 tokens, " in said.out, said
    train, valid = documents(tmp_path / "d"), documents(tmp_path / "d-valid")
    assert sorted(train + valid) == [(i // 100 + 3, i % 100 + 3, 2) for i in range(400)]
    assert 20 <= len(valid) <= 60 and train == sorted(train)
    note = json.loads((tmp_path / "d-valid.json").read_text())
    assert note["documents"] == len(valid) and (note["valid_share"], note["seed"]) == (0.1, 1234)
    assert prepare(*words, tmp_path / "again").code == 0
    assert documents(tmp_path / "again-valid") == valid
    assert prepare(*words, tmp_path / "other", "--seed", 7).code == 0
    assert documents(tmp_path / "other-valid") != valid


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--eod", "<nothing>"], "is no token"),
        (["--input", "/no/such.txt"], "no such file"),
        (["--text-key", "body"], "no key 'body'"),
        (["--valid-share", "1"], "must be from 0 to below 1"),
        (["--valid-share", "1e-9"], "no document of 3 fell to"),
    ],
)
def test_refused_and_nothing_left(site, text, tmp_path, prepare, more, line):
    words = ("--tokenizer", site / "teacher", "--input", text, "--output", tmp_path / "out" / "d")
    assert line in refused(prepare(*words, *more))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
