"""The part of the page that tells a search, and what it makes of a file that is not whole."""

from __future__ import annotations

import json

import pytest
from made import FULL, write_auto
from pages import read_page

from mbridge_prune.report.search_record import read_search


@pytest.fixture
def folder(tmp_path):
    return write_auto(tmp_path / "run")


def records(folder):
    return [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]


def keep(folder, *kinds):
    """Leaves only these kinds in the file."""
    write(folder, [r for r in records(folder) if r["kind"] in kinds])


def write(folder, lines):
    (folder / "candidates.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))


def test_the_page_tells_the_search(folder):
    page, found = read_page(folder), records(folder)
    head = next(r for r in found if r["kind"] == "search")
    inside = next(r for r in found if r["kind"] == "cloud")["in_budget"]
    for words in (f"{head['grid']:,}in the space", f"{inside}inside 100.0M parameters",
                  "16measured on 16 samples", "8measured on 64 samples", "4scored by mmlu_10pct_bs1", "1winner"):  # fmt: skip
        assert words in page.text
    assert "on 8 candidates measured to check it 0.93" in page.text
    winner = found[-1]
    rows = page.rows("The best candidates, best first")
    assert list(rows) == ["1 winner", "2", "3", "4"]
    scores = sorted((r["score"] for r in found if r["kind"] == "score"), reverse=True)
    assert [row[0] for row in rows.values()] == [f"{s:.3f}" for s in scores]
    assert rows["1 winner"][1] == f"{winner['params'] / 1e6:.{2 if winner['params'] < 99.95e6 else 1}f}M"
    cuts = [r for r in found if r["kind"] == "axis"]
    assert len(page.tables["Measured single cuts"]) == 1 + len(cuts)
    assert page.rows("The search space")["hidden_size"][0] == str(len(head["space"]["hidden_size"]))


def test_kl_and_loss_are_said_as_they_are_not_as_the_search_negates_them(tmp_path):
    page = read_page(write_auto(tmp_path / "run", "kl"))
    rows = page.rows("The best candidates, best first")
    values = [float(row[0]) for row in rows.values()]
    assert values == sorted(values) and values[0] > 0
    assert "1 winner" in rows


def test_a_broken_last_line_is_left_out(folder):
    before = read_search(folder / "candidates.jsonl")
    path = folder / "candidates.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "score", "sizes": {"hid')
    after = read_search(path)
    assert after.scored == before.scored and after.broken == [len(path.read_text().splitlines())]
    assert "cut short when a run was killed" in read_page(folder).text


def test_a_line_broken_by_a_kill_in_the_middle_is_left_out(folder):
    path = folder / "candidates.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], "[1, 2]", *lines[3:]]) + "\n")
    search = read_search(path)
    assert search.broken == [4, 5]
    assert search.winner.sizes == json.loads(lines[-1])["sizes"]


@pytest.mark.parametrize("kinds", [
    ("search",), ("halving",), ("score",), ("search", "cloud"), ("search", "axis"), ("search", "surrogate"),
    ("search", "pair"), ("search", "score", "winner"), ("winner",), ("search", "axis", "pair", "halving"),
])  # fmt: skip
def test_a_page_is_made_of_whatever_kinds_there_are(folder, kinds):
    keep(folder, *kinds)
    page = read_page(folder)
    assert "The search" in page.text and page.loads() == []


def test_a_file_without_a_measurement_is_no_search(folder):
    keep(folder, "identity")
    assert read_search(folder / "candidates.jsonl") is None
    assert "The search" not in read_page(folder).text


def test_a_candidate_known_from_the_check_is_counted_in_its_round(folder):
    lines = records(folder)
    scored = next(r["sizes"] for r in lines if r["kind"] == "score")
    lines = [r for r in lines if not (r["kind"] == "halving" and r["round"] == 1 and r["sizes"] == scored)]
    write(folder, lines)
    assert read_search(folder / "candidates.jsonl").rounds == {0: (16, 16), 1: (8, 64)}


def test_sizes_that_only_name_what_was_cut_are_laid_over_the_full_ones(folder):
    lines = records(folder)
    for r in lines:
        if "sizes" in r:
            r["sizes"] = {h: n for h, n in r["sizes"].items() if n != FULL[h]}
    whole = read_search(folder / "candidates.jsonl")
    write(folder, lines)
    assert read_search(folder / "candidates.jsonl").scored == whole.scored


def test_a_dead_search_has_no_winner(folder):
    keep(folder, "search", "axis", "pair", "cloud", "surrogate", "halving")
    page = read_page(folder)
    assert "winner" not in page.text
    assert len(page.tables["The best candidates, best first"]) > 4


def test_a_search_without_a_plan_is_told_as_far_as_it_came(folder):
    """Killed, or nothing was good enough: no plan.json, and everything is kept."""
    (folder / "plan.json").unlink()
    head = {"params": 134_515_008}
    write(
        folder,
        [{**r, **head} if r["kind"] == "search" else r for r in records(folder) if r["kind"] != "winner"],
    )
    page = read_page(folder)
    assert "nothing was cut" in page.text and "the search is not finished" in page.text
    assert "134.5M" in page.text and "What was cut" not in page.text
    assert list(page.rows("The best candidates, best first")) == ["1", "2", "3", "4"]
    keep(folder, "search", "axis")
    assert "no candidate has its score yet" in read_page(folder).text
    settings = json.loads((folder / "settings.json").read_text())
    settings["search"] = {"score_lower_bound": 0.9}
    (folder / "settings.json").write_text(json.dumps(settings))
    write_auto(folder)
    write(
        folder,
        [{**r, **head} if r["kind"] == "search" else r for r in records(folder) if r["kind"] != "winner"],
    )
    (folder / "plan.json").unlink()
    (folder / "settings.json").write_text(json.dumps(settings))
    assert "below score_lower_bound=0.9" in read_page(folder).text
