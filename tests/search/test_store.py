"""candidates.jsonl: appended, read back, mended after a kill, and set aside when the search is another."""

from __future__ import annotations

import json

import pytest

from mbridge_prune import UserError
from mbridge_prune.search.store import Store

OF = {"model": "abc", "budgets": {"params": "70%"}, "top_k": 3}
CUT = {"kind": "axis", "sizes": {"hidden_size": 8, "num_layers": 2}, "samples": 4, "kl": 0.5}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "candidates.jsonl"


def test_what_was_measured_is_found_again(path):
    Store(path, OF).add(CUT)
    again = Store(path, OF)
    assert again.find("axis", {"num_layers": 2, "hidden_size": 8}, 4) == CUT
    assert again.find("halving", CUT["sizes"], 4) == CUT, "a divergence is one, whatever it was measured for"
    assert again.find("axis", CUT["sizes"], 5) is None and again.find("score", CUT["sizes"]) is None
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == ["identity", "axis"]


@pytest.mark.parametrize("broken", ['{"kind": "axis", "si', "\x00\x00", '"half'])
def test_a_broken_last_line_is_skipped_and_the_next_is_whole(path, broken):
    Store(path, OF).add(CUT)
    with path.open("a") as file:
        file.write(broken)
    more = {**CUT, "samples": 8}
    Store(path, OF).add(more)
    assert Store(path, OF).of("axis") == [CUT, more]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_k": 4}, "top_k was 3, is 4"),
        ({"budgets": {"params": "60%"}}, "budgets was .*70%.*60%"),
        ({"candidate_filter": "mine"}, "candidate_filter was None, is 'mine'"),
    ],
)
def test_another_search_keeps_the_former_file(path, change, said, caplog):
    Store(path, OF).add(CUT)
    before = path.read_bytes()
    other = Store(path, {**OF, **change})
    assert other.records == [] and other.find("axis", CUT["sizes"], 4) is None
    assert path.with_name("candidates.1.jsonl").read_bytes() == before
    import re

    assert any(re.search(said, record.getMessage()) for record in caplog.records)


def test_a_file_of_something_else_is_set_aside(path):
    path.parent.mkdir()
    path.write_text("notes\n")
    assert Store(path, OF).records == []
    assert path.with_name("candidates.1.jsonl").read_text() == "notes\n"


def test_without_a_path_records_are_kept_in_memory():
    store = Store(None, OF)
    store.add(CUT)
    assert store.of("axis") == [CUT]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Store(tmp_path / "file" / "candidates.jsonl", OF)
