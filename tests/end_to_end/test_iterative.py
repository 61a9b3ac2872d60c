"""The recipe of docs/guide.md for deep cuts: cut, measure, cut again, look at the chain."""

from __future__ import annotations

import json
import math

from commands import running
from report.pages import Page

from mbridge_prune import cli
from mbridge_prune.report.__main__ import main as report


def test_two_cuts_and_their_chain(run, base, site, tmp_path, capsys):
    def evaluate(model, output):
        with running("evaluate", capsys) as call:
            words = ["--hf-path", model, "--data", site / "tokens.npy", "--window", 12, "--output", output]
            assert call(*words).code == 0
        return json.loads(output.read_text())["metrics"]["loss"]["value"]

    one, two = tmp_path / "one", tmp_path / "two"
    losses = [evaluate(site / "model", tmp_path / "parent.json")]
    assert run(*base, "-o", one, "--prune-export-config", '{"ffn_hidden_size": 64}').code == 0
    losses.append(evaluate(one / "hf", one / "evaluation.json"))
    again = ["--hf-path", one / "hf", "--prune-export-config", '{"num_layers": 3, "num_attention_heads": 4}']
    assert run(*base, "-o", two, *again).code == 0
    losses.append(evaluate(two / "hf", two / "evaluation.json"))

    capsys.readouterr()
    assert cli.run(report, ["chain", str(tmp_path / "parent.json"), str(one), str(two)]) == 0
    assert capsys.readouterr().out.strip() == str(two / "chain.html")
    page = Page((two / "chain.html").read_text(encoding="utf-8"))
    rows = page.rows("What every step left")
    assert list(rows) == ["0. model", "1. one", "2. two"]
    sizes = page.rows("Sizes of every cut")
    assert sizes["ffn_hidden_size"] == ["96", "64", "64"]
    assert sizes["num_layers"] == ["4", "4", "3"]
    assert sizes["num_attention_heads"] == ["8", "8", "4"]
    for row, loss in zip(rows.values(), losses, strict=True):
        assert f"{math.exp(loss):,.1f}" in row
