"""A search whose winner is repaired: candidates get their score as they would be exported."""

from __future__ import annotations

import json

import pytest
import torch
from models import cut, load, loop_over, tokens, write_hf

import mbridge_prune as mbp
from mbridge_prune.evaluate.divergence import Reference

TEXT, HELD_OUT = tokens(40, length=48, seed=35), tokens(6, seed=36)
SPACE = {"hidden_size_divisor": 16, "ffn_hidden_size_divisor": 32, "num_layers_divisor": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("repaired") / "model"
    write_hf("llama", path, seed=4)
    return path


def searched(folder, checkpoint, **config):
    loaded = load(folder)
    _, plan = mbp.prune(
        loaded.unwrapped_model,
        [("mcore_minitron", SPACE)],
        {"params": "75%"},
        config={"forward_loop": mbp.CalibrationLoop(TEXT, 1), "held_out": HELD_OUT, "checkpoint": checkpoint,
                "max_width_pruning": 0.5, "top_k": 3, **config},
    )  # fmt: skip
    scored = [json.loads(line) for line in checkpoint.with_name("candidates.jsonl").read_text().splitlines()]
    return loaded.unwrapped_model, plan, {str(r["sizes"]): r for r in scored if r["kind"] == "score"}


@pytest.mark.parametrize("repair", ["auto", "sequential"])
def test_what_is_scored_is_the_repaired_model(folder, tmp_path, repair):
    model, plan, _ = searched(folder, tmp_path / "scores.safetensors", repair=repair)
    assert plan.repair == ("least_squares" if repair == "auto" else repair)
    assert any(record["repaired"] for record in plan.repaired)
    reference = Reference.of(load(folder).unwrapped_model, HELD_OUT)
    real = -float(reference.kl(model).mean())
    assert plan.search["best"][0]["score"] == pytest.approx(real, rel=1e-4)
    assert plan.loss["kl"]["kl"] == pytest.approx(-real, rel=1e-4)
    # Two others were repaired before the winner was: nothing of theirs is left.
    alone = load(folder).unwrapped_model
    sizes = {name: size for name, size in plan.sizes_after.items() if size != plan.sizes_before[name]}
    cut(alone, sizes, importance="weighted", repair=repair, forward_loop=mbp.CalibrationLoop(TEXT, 1),
        checkpoint=tmp_path / "scores.safetensors")  # fmt: skip
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, alone.state_dict()[name]), name


def test_what_layers_did_that_go_is_taken_over_before_the_score(folder, tmp_path):
    widths = ["hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"]
    model, plan, _ = searched(
        folder, tmp_path / "scores.safetensors", repair="least_squares", max_depth_pruning=0.5,
        hparams_to_skip=widths, forward_loop=mbp.CalibrationLoop(tokens(60, length=48, seed=35), 1),
    )  # fmt: skip
    assert plan.sizes_after["num_layers"] < 4
    assert any(r["repaired"] and r["target"] == "removed_layers" for r in plan.repaired)
    real = -float(Reference.of(load(folder).unwrapped_model, HELD_OUT).kl(model).mean())
    assert plan.search["best"][0]["score"] == pytest.approx(real, rel=1e-4)


def test_another_order_of_the_layers_is_another_search(folder, tmp_path):
    """The scores file is gone, and the layers are ranked otherwise: what was measured is of other layers."""
    file = tmp_path / "scores.safetensors"
    searched(folder, file, repair="none", max_depth_pruning=0.5)
    file.unlink()
    searched(folder, file, repair="none", max_depth_pruning=0.5, depth="greedy")
    assert (tmp_path / "candidates.1.jsonl").is_file()


def test_scores_of_other_text_are_another_search(folder, tmp_path):
    """Of a user's own loop nothing but the scores says what it read."""
    file = tmp_path / "scores.safetensors"
    for seed in (1, 2):
        searched(folder, file, repair="none", forward_loop=loop_over(tokens(4, seed=seed)))
        file.unlink()
    assert (tmp_path / "candidates.1.jsonl").is_file()


def test_greedy_depth_where_no_layer_may_go_is_no_obstacle(folder, tmp_path):
    for _ in range(2):
        _, plan, _ = searched(
            folder,
            tmp_path / "scores.safetensors",
            repair="none",
            depth="greedy",
            hparams_to_skip=["num_layers"],
        )
    assert plan.sizes_after["num_layers"] == 4


def test_the_last_winner_in_the_log_is_the_one_that_is_cut(folder, tmp_path):
    file = tmp_path / "scores.safetensors"
    found = [searched(folder, file, repair="none", top_k=k)[1].sizes_after for k in (1, 30, 1)]
    lines = map(json.loads, (tmp_path / "candidates.jsonl").read_text().splitlines())
    winners = [r["sizes"] for r in lines if r["kind"] == "winner"]
    assert winners[-1] == found[-1] == found[0]
    assert found[1] != found[0], "more scores find a better one, or this shows nothing"


def test_another_repair_is_another_search(folder, tmp_path):
    _, _, plain = searched(folder, tmp_path / "scores.safetensors", repair="none")
    _, _, repaired = searched(folder, tmp_path / "scores.safetensors", repair="least_squares")
    both = plain.keys() & repaired.keys()
    assert both, "the same finalists: they are chosen without repair"
    assert all(plain[sizes]["score"] != repaired[sizes]["score"] for sizes in both)
