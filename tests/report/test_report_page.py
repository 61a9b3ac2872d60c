"""report.html says what the files say, loads nothing, and refuses a folder that is no finished run."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from made import FULL, LOSS, MOE, write_auto, write_run
from pages import DASH, TIMES, Page, read_page
from safetensors.numpy import load_file, save_file

from mbridge_prune import runtime
from mbridge_prune.errors import UserError
from mbridge_prune.importance.scores_file import FORMAT
from mbridge_prune.report.page import write_report


def plan_of(folder):
    return json.loads((folder / "plan.json").read_text())


def test_a_page_loads_nothing_and_labels_every_plot(tmp_path):
    for folder in (
        write_run(tmp_path / "manual"),
        write_auto(tmp_path / "auto"),
        write_run(tmp_path / "moe", MOE),
    ):
        content = write_report(folder).read_text(encoding="utf-8")
        page = Page(content)
        assert page.loads() == []
        assert not re.search(r"https?:|@import|<script|<link|<img|<iframe", content)
        plots = [dict(a) for a in group_attributes(content, "div") if ("role", "img") in a]
        assert len(plots) > 4
        assert all(len(plot["aria-label"]) > 10 for plot in plots)
        assert not [path for path in folder.iterdir() if "partial" in path.name]


def group_attributes(content, tag):
    return [re.findall(r'([\w-]+)="([^"]*)"', found) for found in re.findall(rf"<{tag} ([^>]*)>", content)]


def test_the_page_holds_the_numbers_of_the_plan(tmp_path):
    page = read_page(write_run(tmp_path / "run", loss=LOSS))
    assert "made-up, cut to 68.1 % of its parameters" in page.text
    assert "134,515,008 → 91,646,464" in page.text
    sizes = page.rows("Sizes before and after the cut")
    assert sizes["hidden_size"][:3] == ["64", "48", "75.0 %"]
    assert sizes["num_query_groups"][:3] == ["2", "same", "100.0 %"]
    cost = page.rows("What the cut cost")
    assert cost["loss, nats a token"] == ["2.841 ± 0.012", "3.209 ± 0.013", "0.367"]
    assert cost["perplexity"] == [
        f"{np.exp(2.8412):.1f}",
        f"{np.exp(3.2087):.1f}",
        f"{TIMES} {np.exp(0.3675):.2f}",
    ]
    assert cost["KL to the full model, nats a token"][1] == "0.392 ± 0.007"
    assert page.rows("Time of each step")["together"][0] == "34.3 s"
    assert page.rows("Settings: calibration")["num_samples"] == ["32"]
    assert page.rows("Host, fingerprints and versions")["torch"] == ["2.13.0"]
    assert "experts that calibration sent no token: layers.1: 3" in page.text
    assert "The search" not in page.text


def test_importance_by_layer_is_that_of_the_scores_file(tmp_path):
    folder = write_run(tmp_path / "run")
    page, scores = read_page(folder), load_file(folder / "scores.safetensors")
    for layer, row in page.rows("ffn_hidden_size: importance by layer").items():
        units = np.sort(scores[f"layers.{layer}.ffn_hidden_size"].astype(float))
        kept, of, low, median, high, cut, share = row
        assert (kept, of) == ("64", "96")
        for said, q in ((low, 0.05), (median, 0.5), (high, 0.95)):
            assert float(said) == pytest.approx(np.quantile(units, q), rel=0.01)
        assert units[31] < float(cut) * 1.01 and float(cut) * 0.99 < units[32]  # 32 of 96 go
        assert share == f"{100 * units[32:].sum() / units.sum():.1f} %"
    layers = page.rows("Importance of every layer")
    for layer, score in enumerate(plan_of(folder)["layer_scores"]):
        assert float(layers[str(layer)][0]) == pytest.approx(score, rel=0.001)
    removed = [layer for layer, row in layers.items() if row[2] == "removed"]
    assert removed == [str(n) for n in set(range(6)) - set(plan_of(folder)["layers_kept"])]
    assert f"1 layer removed: {removed[0]}." in page.text


def test_kept_heads_are_numbered_through_their_groups_and_go_with_them(tmp_path):
    folder = write_run(
        tmp_path / "run", cut={"num_query_groups": 1, "num_attention_heads": 3, "num_layers": 5}
    )
    page, kept = read_page(folder), plan_of(folder)["kept"]
    rows = page.rows("num_attention_heads: kept units by layer")
    for layer in plan_of(folder)["layers_kept"]:
        group = kept[f"layers.{layer}.num_query_groups"][0][0]
        heads = sorted(4 * group + place for place in kept[f"layers.{layer}.num_attention_heads"][group])
        assert _numbers(rows[str(layer)][0]) == heads
    assert sum(row[0] == "layer removed" for row in rows.values()) == 1


def _numbers(said: str) -> list[int]:
    """0-2, 5 -> [0, 1, 2, 5]"""
    found: list[int] = []
    for part in said.split(", "):
        first, _, last = part.partition(DASH)
        found += range(int(first), int(last or first) + 1)
    return found


def test_channels_of_removed_experts_count_as_removed(tmp_path):
    folder = write_run(tmp_path / "moe", MOE, {"num_moe_experts": 6, "moe_ffn_hidden_size": 16})
    page = read_page(folder)
    rows = page.rows("moe_ffn_hidden_size: importance by layer")
    assert {tuple(row[:2]) for row in rows.values()} == {(str(6 * 16), str(8 * 24))}
    kept = plan_of(folder)["kept"]["layers.2.num_moe_experts"][0]
    assert _numbers(page.rows("num_moe_experts: kept units by layer")["2"][0]) == sorted(kept)
    assert page.rows("Sizes before and after the cut")["active on a token"][2] == "78.7 %"
    assert "61,000,000 → 48,000,000" in page.text


@pytest.mark.parametrize(
    ("facts", "said", "unsaid"),
    [
        ({}, ["cosine between what goes in", "times its routing weight"], []),
        ({"depth": "greedy"}, ["KL to the full model without the layer"], ["cosine"]),
        ({"depth": "greedy_logits"}, ["squared error of the logits"], ["cosine"]),
        ({"experts": "gate_free"}, ["whatever its routing weight"], ["times its routing weight"]),
        ({"importance": "weighted"}, ["times its routing weight", "by the weighted ranking"], []),
    ],
)
def test_the_page_says_what_was_measured(tmp_path, facts, said, unsaid):
    folder = write_run(tmp_path / "run", full=MOE)
    plan = plan_of(folder)
    plan["importance"] = facts.pop("importance", "minitron")
    plan["calibration"] |= facts
    (folder / "plan.json").write_text(json.dumps(plan))
    page = read_page(folder)
    assert all(words in page.text for words in said)
    assert not any(words in page.text for words in unsaid)


def test_layers_of_a_hybrid_are_named_by_kind_and_prediction_heads_come_last(tmp_path):
    folder = write_run(tmp_path / "run", cut={})
    plan, scores = plan_of(folder), load_file(folder / "scores.safetensors")
    for key in list(scores):
        place, _, hparam = key.rpartition(".")
        if place in ("layers.1", "layers.4") and hparam != "num_layers":
            scores.pop(key), plan["kept"].pop(key)
            if hparam == "ffn_hidden_size":
                for new, units, kept in (("mamba_num_heads", 4, [[0, 1, 2, 3]]),
                                         ("mamba_head_dim", 24, [[0, 1], [2, 3], [4, 5], [0, 5]])):  # fmt: skip
                    scores[f"{place}.{new}"] = np.arange(1, units + 1, dtype=np.float32)
                    plan["kept"][f"{place}.{new}"] = kept
    for hparam in ("ffn_hidden_size", "num_attention_heads", "num_query_groups"):
        scores[f"mtp.0.{hparam}"] = scores[f"layers.0.{hparam}"]
        plan["kept"][f"mtp.0.{hparam}"] = plan["kept"][f"layers.0.{hparam}"]
    rewrite(folder, plan, scores)
    page = read_page(folder)
    assert "Mamba 1, 4" in page.text and "attention + MLP 0, 2, 3, 5" in page.text
    assert list(page.rows("ffn_hidden_size: importance by layer")) == ["0", "2", "3", "5", "mtp 0"]
    assert page.rows("mamba_head_dim: importance by layer")["1"][:2] == ["8", "24"]


def rewrite(folder, plan, scores):
    meta = {"ranking": "minitron", "tokens": 1, "model": plan["fingerprint"]}
    (folder / "plan.json").write_text(json.dumps(plan))
    save_file(scores, folder / "scores.safetensors",
              {"format": FORMAT, "meta": json.dumps(meta)})  # fmt: skip


def test_a_run_without_scores_has_a_page(tmp_path):
    page = read_page(write_run(tmp_path / "run", scores=False))
    assert "took no scores" in page.text
    assert page.rows("Sizes before and after the cut")["hidden_size"][1] == "48"


def test_scores_that_lay_elsewhere_are_read_there_or_said_to_be_gone(tmp_path):
    folder = write_run(tmp_path / "run")
    settings = plan_of(folder)["settings"]
    settings["prune"]["scores"] = str(tmp_path / "elsewhere.safetensors")
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "scores.safetensors").rename(tmp_path / "elsewhere.safetensors")
    assert "ffn_hidden_size: importance by layer" in read_page(folder).tables
    (tmp_path / "elsewhere.safetensors").unlink()
    page = read_page(folder)
    assert "is no longer there" in page.text
    assert "num_attention_heads: kept units by layer" in page.tables


@pytest.mark.parametrize("name", ["plan.json", "scores.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(folder / name))} is missing"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_what_is_no_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    folder = write_run(tmp_path / "run")
    (folder / "plan.json").write_text('{"sizes_before": {')
    with pytest.raises(UserError, match=r"plan\.json cannot be read"):
        write_report(folder)
    (folder / "plan.json").write_text('{"sizes_before": {}}')
    with pytest.raises(UserError, match="lacks sizes_after, params_before"):
        write_report(folder)


def test_settings_come_from_the_plan_or_are_missed(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "settings.json").unlink()
    assert read_page(folder).rows("Settings: calibration")["seed"] == ["1"]
    plan = plan_of(folder)
    del plan["settings"]
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"settings\.json is missing"):
        write_report(folder)


def test_scores_of_another_model_are_refused(tmp_path):
    folder = write_run(tmp_path / "run", fingerprint="another")
    with pytest.raises(UserError, match="scores of another model"):
        write_report(folder)
    other = write_run(tmp_path / "other", {**FULL, "num_attention_heads": 6}, {})
    (other / "scores.safetensors").replace(tmp_path / "run" / "scores.safetensors")
    write_run(tmp_path / "third", cut={})
    (tmp_path / "run" / "scores.safetensors").replace(tmp_path / "third" / "scores.safetensors")
    with pytest.raises(UserError, match="do not fit each other in layers.0.num_attention_heads"):
        write_report(tmp_path / "third")


def test_text_of_a_run_cannot_break_the_page(tmp_path):
    nasty = '<script>alert("1")</script>&amp;'
    settings = {"model": {"hf_path": nasty}, "prune": {nasty: nasty}, "loose": nasty}
    folder = write_run(tmp_path / "run", settings=settings, versions={nasty: nasty}, seconds={nasty: 1.0})
    content = write_report(folder).read_text()
    assert "<script" not in content
    page = Page(content)
    assert page.rows("Settings: prune")[nasty] == [nasty]
    assert page.rows("Settings: further settings")["loose"] == [nasty]
    assert f"{nasty}, cut to" in page.text


def test_the_same_files_give_the_same_page(tmp_path, monkeypatch):
    folder = write_auto(tmp_path / "run")
    first = write_report(folder).read_bytes()
    monkeypatch.chdir(folder)
    assert write_report(".").read_bytes() == first


def test_a_page_of_a_large_model_is_small(tmp_path):
    full = {**FULL, "num_attention_heads": 64, "num_query_groups": 8, "num_moe_experts": 160,
            "moe_ffn_hidden_size": 4, "num_layers": 60}  # fmt: skip
    cut = {"num_moe_experts": 128, "num_attention_heads": 48, "num_layers": 50}
    assert write_report(write_run(tmp_path / "run", full, cut)).stat().st_size < 1_000_000


def test_another_rank_writes_nothing(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    assert write_report(folder) == folder / "report.html"
    assert not (folder / "report.html").exists()


def test_what_a_repair_has_made_good_stands_by_kind_of_weight(tmp_path):
    write_run(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    fc2 = {"channels": [96, 64], "tokens": 5000, "repaired": True}
    plan["repair"] = "sequential"
    plan["repaired"] = [
        {"weight": "layers.0.mlp.linear_fc2", **fc2, "sliced_error": 0.2, "repaired_error": 0.1},
        {"weight": "layers.1.mlp.linear_fc2", **fc2, "sliced_error": 0.4, "repaired_error": 0.2},
        {"weight": "layers.2.mlp.linear_fc2", "channels": [96, 64], "tokens": 5, "repaired": False, "why": "few"},
        {"weight": "layers.0.mlp.linear_fc2", **fc2, "target": "hidden_state", "sliced_error": 0.5,
         "repaired_error": 0.4},
        {"weight": "layers.2.mlp.linear_fc2", **fc2, "target": "removed_layers", "sliced_error": 1.0,
         "repaired_error": 0.75},
        *({"weight": f"{place}.mlp.experts.{expert}.linear_fc1", **fc2, "sliced_error": 0.2, "repaired_error": 0.1}
          for place in ("layers.2", "mtp.0") for expert in (0, 11)),
    ]  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    rows = read_page(tmp_path).tables["Repaired weights"]
    assert [[cell.replace("\u2009", " ").replace("\xa0", " ") for cell in row] for row in rows[1:]] == [
        ["mlp.linear_fc2", "what it writes", "2 of 3", "30.0 %", "15.0 %"],
        ["mlp.linear_fc2", "what the hidden state lacks", "1 of 1", "50.0 %", "40.0 %"],
        ["mlp.linear_fc2", "what removed layers did", "1 of 1", "100.0 %", "75.0 %"],
        ["mlp.experts.linear_fc1", "what it writes", "4 of 4", "20.0 %", "10.0 %"],
    ]
