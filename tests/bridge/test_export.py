"""Export: whole, sharded, verified, never over something, never half."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from models import cut, difference, load, load_hf, run, run_hf, tokens
from safetensors.torch import load_file, save_file

import mbridge_prune as mbp
from mbridge_prune.bridge import export

SIZES = {"hidden_size": 40, "ffn_hidden_size": 56, "num_layers": 3}


@pytest.fixture(scope="module", params=["llama", "llama_tied"])
def pruned(request, hf_folder):
    """(loaded and pruned, plan, source folder)."""
    loaded = load(hf_folder(request.param))
    return loaded, cut(loaded.unwrapped_model, SIZES), hf_folder(request.param)


@pytest.fixture
def folder(pruned, tmp_path):
    """A freshly exported folder."""
    return write(pruned, tmp_path / "hf")


def write(pruned, path, **options):
    loaded, plan, source = pruned
    return mbp.export_hf(
        loaded.bridge, loaded.model, path, layers_kept=plan.layers_kept, source=source, **options
    )


def test_one_file(pruned, folder):
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json"} <= names
    assert mbp.verify_hf(folder) == pruned[1].params_after
    assert [p.name for p in folder.parent.iterdir()] == ["hf"], "nothing else is left"


def test_shards_hold_the_same_model(pruned, folder, tmp_path):
    sharded = write(pruned, tmp_path / "sharded", shard_bytes=20_000)
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert [p.name for p in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in shards for name in load_file(file)}
    assert index["weight_map"] == held
    whole = load_file(folder / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for file in shards:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= 20_000 or len(tensors) == 1
        assert all(torch.equal(t, whole[n]) for n, t in tensors.items())
    ids = tokens()
    assert torch.equal(run_hf(load_hf(sharded), ids), run_hf(load_hf(folder), ids))
    assert difference(run(pruned[0].unwrapped_model, ids), run_hf(load_hf(sharded), ids)) <= 1e-5
    assert mbp.verify_hf(sharded) == pruned[1].params_after


def test_an_empty_folder_is_used_and_a_full_one_refused(pruned, tmp_path):
    path = tmp_path / "hf"
    path.mkdir()
    write(pruned, path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(mbp.UserError, match="is not empty"):
        write(pruned, path)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(mbp.UserError, match="is not empty"):
        write(pruned, tmp_path / "file")


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_leaves_nothing(pruned, after, tmp_path, monkeypatch):
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"half a shard")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(export, "save_tensors", full)
    with pytest.raises(mbp.UserError, match="No space left on device.*nothing was left"):
        write(pruned, tmp_path / "hf", shard_bytes=20_000)
    assert calls and list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert mbp.verify_hf(write(pruned, tmp_path / "hf")) == pruned[1].params_after


def test_what_a_dead_run_left_aside_does_not_matter(pruned, tmp_path):
    (tmp_path / ".hf.partial").mkdir()
    (tmp_path / ".hf.partial" / "model.safetensors").write_bytes(b"half")
    write(pruned, tmp_path / "hf", shard_bytes=20_000)
    assert not (tmp_path / ".hf.partial").exists()
    assert not (tmp_path / "hf" / "model.safetensors").exists()


def test_model_card_and_tokenizer(pruned, tmp_path):
    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    path = write(pruned, tmp_path / "hf", model_card="# what was cut\n", tokenizer=Tokenizer())
    assert (path / "README.md").read_text() == "# what was cut\n"
    assert (path / "tokenizer.json").exists()
    assert (path / "generation_config.json").read_text() == (pruned[2] / "generation_config.json").read_text()


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda t: t.update({NAME: t[NAME][:-1].clone()}),
            rf"{NAME}: config says \(56, 40\), file has \(55, 40\)",
        ),
        (lambda t: t.pop(NAME), rf"{NAME}: config says \(56, 40\), file has None"),
        (
            lambda t: t.update({"model.layers.3.extra": torch.zeros(2)}),
            r"model\.layers\.3\.extra: not in the arch",
        ),
    ],
    ids=["shape", "missing", "extra"],
)
def test_verify_names_what_disagrees(folder, edit, message):
    change(folder, edit)
    with pytest.raises(RuntimeError, match=message):
        mbp.verify_hf(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 48), ("num_hidden_layers", 2), ("num_hidden_layers", 4), ("head_dim", 4)],
)
def test_verify_catches_a_wrong_config(folder, field, value):
    config = json.loads((folder / "config.json").read_text())
    assert config[field] != value
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(RuntimeError, match="inconsistent"):
        mbp.verify_hf(folder)


def test_verify_checks_the_plan(pruned, folder):
    """A folder that is consistent in itself, but not what was asked for."""
    plan = pruned[1]
    assert mbp.verify_hf(folder, plan.sizes_after) == plan.params_after
    for hparam, size in plan.sizes_after.items():
        with pytest.raises(RuntimeError, match=f"{hparam}={size}, the plan {size + 1}"):
            mbp.verify_hf(folder, {**plan.sizes_after, hparam: size + 1})


def test_export_of_inconsistent_layers_is_caught(pruned, tmp_path, monkeypatch):
    """A config that does not describe the tensors never gets the final name."""
    real = export.pruned_hf_config

    def wrong(*args):
        config = real(*args)
        config.intermediate_size += 1
        return config

    monkeypatch.setattr(export, "pruned_hf_config", wrong)
    with pytest.raises(mbp.UserError, match="inconsistent"):
        write(pruned, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
