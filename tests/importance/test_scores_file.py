"""The scores file: read back exactly, reused without a forward pass, refused where it does not belong."""

from __future__ import annotations

import json

import pytest
import torch
from models import (
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    cut,
    difference,
    load,
    load_hf,
    loop_over,
    masked_dense,
    run,
    run_hf,
    tokens,
    write_hf,
)
from safetensors.torch import load_file, save_file

import mbridge_prune as mbp
from mbridge_prune import mcore
from mbridge_prune.dynamic import SliceTable
from mbridge_prune.importance import Scores, load_scores, model_fingerprint, save_scores

SIZES = {"hidden_size": 40, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}


def never(model):
    raise AssertionError("the scores are in the file: no forward pass is needed")


@pytest.fixture(scope="module")
def scored(hf_folder, tmp_path_factory):
    """(scores file of the tiny Llama, logits of the pruned model, plan)."""
    path = tmp_path_factory.mktemp("scores") / "deep" / "scores.safetensors"
    model = load(hf_folder("llama")).unwrapped_model
    plan = cut(model, SIZES, checkpoint=path)
    return path, run(model, tokens()), plan


def test_round_trip(tmp_path):
    units = {
        "hidden_size": torch.rand(5),
        "layers.11.ffn_hidden_size": torch.rand(3),
        "num_layers": torch.rand(2),
    }
    save_scores(Scores(units, {"model": "m", "tokens": 7}), tmp_path / "s")
    back = load_scores(tmp_path / "s", {"model": "m", "data": None})
    assert back.meta == {"model": "m", "tokens": 7}
    assert back.units.keys() == units.keys() and all(torch.equal(back.units[k], units[k]) for k in units)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_second_prune_runs_no_forward(scored, hf_folder):
    path, logits, plan = scored
    model = load(hf_folder("llama")).unwrapped_model
    again = cut(model, SIZES, checkpoint=path, forward_loop=never)
    assert torch.equal(run(model, tokens()), logits)
    assert (again.kept, again.layers_kept) == (plan.kept, plan.layers_kept)
    assert cut(load(hf_folder("llama")).unwrapped_model, {"ffn_hidden_size": 8}, checkpoint=path,
               forward_loop=None).sizes_after["ffn_hidden_size"] == 8  # fmt: skip


def test_scores_of_another_model_are_refused(scored, hf_folder, tmp_path):
    write_hf("llama", tmp_path / "twin", seed=1)
    for folder in (tmp_path / "twin", hf_folder("llama_tied")):
        with pytest.raises(mbp.UserError, match="scores of another model"):
            cut(load(folder).unwrapped_model, SIZES, checkpoint=scored[0], forward_loop=never)


def test_a_pruned_model_is_another_model(scored, hf_folder):
    model = load(hf_folder("llama")).unwrapped_model
    cut(model, {"hidden_size": 48})
    with pytest.raises(mbp.UserError, match="another model"):
        cut(model, {"hidden_size": 40}, checkpoint=scored[0], forward_loop=never)


def test_scores_of_other_data_are_refused(hf_folder, tmp_path):
    def loop(name, inner):
        def run_it(model):
            inner(model)

        run_it.fingerprint = name
        return run_it

    path, folder = tmp_path / "s", hf_folder("llama")
    cut(
        load(folder).unwrapped_model, SIZES, checkpoint=path, forward_loop=loop("text a", loop_over(tokens()))
    )
    cut(load(folder).unwrapped_model, SIZES, checkpoint=path, forward_loop=loop("text a", never))
    with pytest.raises(mbp.UserError, match="scores of another data.*text a.*text b"):
        cut(load(folder).unwrapped_model, SIZES, checkpoint=path, forward_loop=loop("text b", never))


def test_broken_files_are_refused(scored, hf_folder, tmp_path):
    whole = scored[0].read_bytes()
    files = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"these are no scores at all"}
    model = load(hf_folder("llama")).unwrapped_model
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(mbp.UserError, match=f"{name} is not a readable scores file"):
            cut(model, SIZES, checkpoint=tmp_path / name, forward_loop=never)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(mbp.UserError, match="not a scores file of this version"):
        cut(model, SIZES, checkpoint=tmp_path / "other.safetensors", forward_loop=never)


def test_scores_with_a_gap_are_refused(scored, hf_folder, tmp_path):
    scores = load_scores(scored[0], {})
    scores.units["layers.2.ffn_hidden_size"] = torch.zeros(5)
    save_scores(scores, tmp_path / "s")
    with pytest.raises(mbp.UserError, match=r"layers\.2\.ffn_hidden_size has 96 units, the scores 5"):
        cut(load(hf_folder("llama")).unwrapped_model, SIZES, checkpoint=tmp_path / "s", forward_loop=never)


def test_equal_scores_keep_the_first_units_and_layers(hf_folder, tmp_path):
    model = load(hf_folder("llama")).unwrapped_model
    table = SliceTable.of(model, mcore.root_scope(model))
    units = {key: torch.ones(axis.size) for key, axis in table.axes.items()}
    meta = {"model": model_fingerprint(table), "ranking": "minitron"}
    save_scores(Scores(units, meta), tmp_path / "s")
    plan = cut(model, SIZES, checkpoint=tmp_path / "s", forward_loop=never)
    assert plan.layers_kept == [0, 1]
    assert plan.kept["hidden_size"] == [list(range(40))]
    assert all(plan.kept[f"layers.{i}.num_attention_heads"] == [[0, 1], [0, 1]] for i in range(LAYERS))


def test_skip_sorting_keeps_the_first_units(hf_folder):
    folder, ids = hf_folder("llama"), tokens()
    model = load(folder).unwrapped_model
    sizes = {k: v for k, v in SIZES.items() if k != "num_layers"}
    plan = cut(model, sizes, forward_loop=never, skip_sorting=True)
    first = {"hidden_size": [list(range(40))]}
    for i in range(LAYERS):
        first[f"layers.{i}.ffn_hidden_size"] = [list(range(56))]
        first[f"layers.{i}.num_attention_heads"] = [[0, 1], [0, 1]]
        first[f"layers.{i}.num_query_groups"] = [[0, 1]]
    plan.kept = first
    assert difference(run(model, ids), run_hf(masked_dense(load_hf(folder), plan), ids)) <= 1e-5


def test_skip_sorting_needs_scores_for_depth_alone(scored, hf_folder):
    with pytest.raises(mbp.UserError, match="skip_sorting"):
        cut(
            load(hf_folder("llama")).unwrapped_model, {"num_layers": 2}, forward_loop=never, skip_sorting=True
        )
    model, dense, ids = load(hf_folder("llama")).unwrapped_model, load_hf(hf_folder("llama")), tokens()
    plan = cut(model, {"num_layers": 2}, forward_loop=never, skip_sorting=True, checkpoint=scored[0])
    assert plan.layers_kept == scored[2].layers_kept
    whole = {f"layers.{i}.{k}": [list(range(n))] for i in range(LAYERS)
             for k, n in (("ffn_hidden_size", FFN), ("num_attention_heads", HEADS))}  # fmt: skip
    plan.kept = {"hidden_size": [list(range(HIDDEN))], **whole}
    assert difference(run(model, ids), run_hf(masked_dense(dense, plan), ids)) <= 1e-5


def test_an_unwritable_scores_file(hf_folder, tmp_path):
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises((mbp.UserError, OSError)):
        cut(load(hf_folder("llama")).unwrapped_model, SIZES, checkpoint=tmp_path / "file" / "scores")


def test_the_file_says_what_it_is(scored):
    units = load_file(scored[0])
    assert set(units) == {"hidden_size", "num_layers"} | {
        f"layers.{i}.{k}"
        for i in range(LAYERS)
        for k in ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
    }
    assert all(u.dtype == torch.float32 for u in units.values())
    meta = load_scores(scored[0], {}).meta
    assert meta["ranking"] == "minitron" and meta["tokens"] == tokens().numel()
    json.dumps(scored[2].to_dict())  # plan.json can be written


def test_fingerprint_sees_every_tensor(hf_folder):
    model = load(hf_folder("qwen3")).unwrapped_model
    table = SliceTable.of(model, mcore.root_scope(model))
    before = model_fingerprint(table)
    assert before == model_fingerprint(table)
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.view(-1)[0] += 1
            assert model_fingerprint(table) != before, name
            p.view(-1)[0] -= 1
