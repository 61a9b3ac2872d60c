"""Cut, distilled, cut again, on one page."""

from __future__ import annotations

import json

import pytest
from made import FULL, LOSS, write_run
from pages import DASH, Page

from mbridge_prune import UserError, cli
from mbridge_prune.report.__main__ import main
from mbridge_prune.report.chain import write_chain

FIRST, SECOND = {"ffn_hidden_size": 64}, {"hidden_size": 48, "num_layers": 5}
CAPTION = "What every step left"


def evaluation(path, loss, kl=None, data="wiki.txt"):
    metrics = {"loss": {"value": loss, "se": 0.013}}
    if kl is not None:
        metrics["kl"] = {"value": kl, "se": 0.002}
    path.write_text(json.dumps({"data": data, "metrics": metrics}))
    return path


@pytest.fixture
def chain(tmp_path):
    """The parent's evaluation, a cut, its distillation, and a second cut that goes on from there."""
    parent = evaluation(tmp_path / "parent.json", 2.813)
    first = write_run(tmp_path / "first", cut=FIRST, loss=LOSS)
    evaluation(first / "evaluation.json", 3.204, 0.391)
    taught = tmp_path / "taught"
    taught.mkdir()
    said = {"teacher": "/models/parent", "tokens": 80_000_000_000, "last_validation": {"step": 9, "loss": 2.9012},
            "seconds": {"training": 7200.0}}  # fmt: skip
    (taught / "distill.json").write_text(json.dumps(said))
    evaluation(taught / "evaluation.json", 2.874, 0.071)
    second = write_run(tmp_path / "second", full={**FULL, **FIRST}, cut=SECOND, params_before=91646464,
                       params_after=70000000)  # fmt: skip
    return [parent, first, taught, second]


def test_every_step_is_a_row(chain):
    path = write_chain(chain)
    assert path == chain[-1] / "chain.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.loads() == []
    rows = page.rows(CAPTION)
    assert list(rows) == ["0. made-up", "1. first", "2. taught", "3. second"]
    assert rows["0. made-up"] == [
        "the parent", "134.5M", "100.0 %", DASH, "2.813 ± 0.013", "16.7", DASH, "2.841 ± 0.012", DASH, DASH
    ]  # fmt: skip
    assert rows["1. first"][:7] == [
        "cut (minitron)",
        "91.65M",
        "68.1 %",
        DASH,
        "3.204 ± 0.013",
        "24.6",
        "0.391 ± 0.002",
    ]
    assert rows["2. taught"] == [
        "distilled from parent", "91.65M", "68.1 %", "80.00B", "2.874 ± 0.013", "17.7", "0.071 ± 0.002", DASH,
        "2.901", "2 h 00 min",
    ]  # fmt: skip
    assert rows["3. second"][:6] == ["cut (minitron)", "70.00M", "52.0 %", DASH, DASH, DASH]
    assert page.rows("Sizes of every cut")["ffn_hidden_size"] == ["96", "64", "64"]
    assert page.rows("Sizes of every cut")["hidden_size"] == ["64", "64", "48"]
    assert "Loss, perplexity and KL: wiki.txt" in page.text
    assert "do not compare" not in page.text
    assert "134.5M: 2.813; 91.65M: 3.204; 91.65M: 2.874." in page.text


def test_losses_on_different_texts_are_said_not_to_compare(chain):
    evaluation(chain[2] / "evaluation.json", 2.874, data="code.txt")
    assert "Measured on different texts, which do not compare: wiki.txt, code.txt." in page_of(chain).text


def page_of(chain):
    return Page(write_chain(chain).read_text(encoding="utf-8"))


def test_without_any_evaluation_the_page_says_how(chain):
    for path in [chain[0], *(folder / "evaluation.json" for folder in chain[1:3])]:
        path.unlink()
    page = page_of(chain[1:])
    assert "--output RUN/evaluation.json does" in page.text
    assert "loss, nats" not in page.text


def test_a_cut_that_does_not_go_on_is_refused(chain, tmp_path):
    other = write_run(tmp_path / "other", cut=SECOND)
    with pytest.raises(
        UserError, match=r"other does not go on from .*first: one ends with ffn_hidden_size=64, .*=96"
    ):
        write_chain([*chain[:3], other])
    assert not (other / "chain.html").exists()


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ("nowhere", "no such run folder"),
        ("empty", "neither plan.json nor distill.json"),
        ("noise", "cannot be read"),
    ],
)
def test_what_is_no_run(chain, tmp_path, last, says, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise").write_text("{")
    words = ["chain", *map(str, chain), str(tmp_path / last)]
    assert cli.run(main, words) == 2
    assert says in capsys.readouterr().err


def test_the_command(chain, tmp_path, capsys):
    assert cli.run(main, ["chain", *map(str, chain), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    one = (tmp_path / "page.html").read_bytes()
    assert write_chain(chain).read_bytes() == one
    assert cli.run(main, ["chain", str(chain[0])]) == 2
    assert "give --output FILE" in capsys.readouterr().err
