"""Two runs side by side, and both commands."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made import LOSS, MOE, write_auto, write_run
from pages import DASH, Page

from mbridge_prune import cli
from mbridge_prune.report.__main__ import main
from mbridge_prune.report.compare import write_comparison


def plan_of(folder):
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture
def two(tmp_path):
    a = write_run(tmp_path / "a", loss=LOSS)
    return a, write_run(tmp_path / "b", cut={"ffn_hidden_size": 48}, seed=1)


def test_sizes_cost_and_settings_stand_side_by_side(two):
    page = Page(write_comparison(*two).read_text(encoding="utf-8"))
    assert page.loads() == []
    rows = page.rows("Sizes and cost of both runs")
    assert rows["hidden_size"] == ["64 → 48", "64"]
    assert rows["ffn_hidden_size"] == ["96 → 64", "96 → 48"]
    assert rows["loss after, nats a token"] == ["3.209 ± 0.013", DASH]
    differing = page.rows("Settings that differ")
    assert differing["calibration.seed"] == ["1", "2"]
    assert differing["prune.export_config.ffn_hidden_size"] == ["64", "48"]
    assert "calibration.num_samples" not in differing
    assert "Both were cut from made-up." in page.text


def test_overlap_of_kept_units_is_counted_on_the_plans(two):
    page = Page(write_comparison(*two).read_text(encoding="utf-8"))
    plans = [plan_of(folder) for folder in two]
    alive = set(plans[0]["layers_kept"]) & set(plans[1]["layers_kept"])
    shares = []
    for n in alive:
        a, b = (set(plan["kept"][f"layers.{n}.ffn_hidden_size"][0]) for plan in plans)
        shares.append(len(a & b) / 48)
    row = page.rows("Agreement on kept units")["ffn_hidden_size"]
    assert row[0] == f"{100 * np.mean(shares):.1f} %"
    assert row[1].startswith(f"{100 * min(shares):.1f} % in layer ")
    assert row[2] == f"{100 * 64 / 96:.1f} %"
    assert abs(float(row[3].replace("\N{MINUS SIGN}", "-"))) < 0.3  # two seeds know nothing of each other
    assert page.rows("Agreement on kept units")["num_query_groups"][:3] == [DASH] * 3


def test_a_run_agrees_with_itself(tmp_path):
    a, b = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")
    page = Page(write_comparison(a, b).read_text(encoding="utf-8"))
    assert page.rows("Agreement on kept units")["ffn_hidden_size"] == ["100.0 %", "100.0 %", "66.7 %", "1.00"]
    assert "Both runs scored the layers alike." in page.text
    assert "x/run and y/run" in page.text


def test_runs_of_different_models_are_not_compared_unit_by_unit(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", MOE, {"num_moe_experts": 6})
    page = Page(write_comparison(a, b).read_text(encoding="utf-8"))
    assert "different models" in page.text
    assert "Agreement on kept units" not in page.tables
    assert page.rows("Sizes and cost of both runs")["num_moe_experts"] == [DASH, "8 → 6"]


def test_two_searches_share_a_plot(tmp_path):
    a, b = write_auto(tmp_path / "a"), write_auto(tmp_path / "b", "kl")
    page = Page(write_comparison(a, b, tmp_path / "c.html").read_text(encoding="utf-8"))
    assert "Measured candidates" in page.text
    assert page.rows("Sizes and cost of both runs")["score of the winner, kl"][0] == DASH


def test_the_commands_write_their_page_and_say_where(two, capsys, tmp_path):
    a, b = two
    assert cli.run(main, [str(a)]) == 0
    assert capsys.readouterr().out.strip() == str(a / "report.html")
    assert cli.run(main, ["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.strip() == str(a / "compare-with-b.html")
    assert cli.run(main, ["compare", str(a), str(b), "--output", str(tmp_path / "two.html")]) == 0
    assert (tmp_path / "two.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("arguments, said", [
    ([], "RUN_DIR"),
    (["nowhere"], "no such run folder: nowhere"),
    (["compare", "nowhere"], "run_b"),
    (["compare", "nowhere", "neither"], "no such run folder: nowhere"),
    (["a", "--colour"], "--colour"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert cli.run(main, arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1


def test_a_page_that_cannot_be_written_is_one_line(two, capsys, tmp_path):
    assert cli.run(main, ["compare", *map(str, two), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot write" in capsys.readouterr().err
