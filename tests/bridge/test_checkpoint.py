"""Which iteration, which config and which files a Megatron checkpoint folder stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mbridge_prune import UserError
from mbridge_prune.bridge.checkpoint import hf_config_of, iteration_folder, put_hf_config


def iteration(folder: Path, backend: str = "torch_dist") -> Path:
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "common_backend": "torch"}))
    return folder


def test_one_iteration_by_its_own_name(tmp_path):
    assert iteration_folder(iteration(tmp_path / "iter_0000020")) == tmp_path / "iter_0000020"


def test_the_latest_of_several_and_by_number(tmp_path):
    for step in ("0000900", "0000020", "10000000"):
        iteration(tmp_path / f"iter_{step}")
    assert iteration_folder(tmp_path).name == "iter_10000000"


def test_a_later_one_that_is_half_written_does_not_count(tmp_path):
    iteration(tmp_path / "iter_0000010")
    (tmp_path / "iter_0000020").mkdir()
    assert iteration_folder(tmp_path).name == "iter_0000010"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    iteration(tmp_path / "iter_0000030")  # complete in itself; the tracker was to be written after it
    assert iteration_folder(tmp_path).name == "iter_0000010"


def test_a_release_and_a_run_folder(tmp_path):
    iteration(tmp_path / "checkpoints" / "release")
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert iteration_folder(tmp_path) == tmp_path / "checkpoints" / "release"


@pytest.mark.parametrize(
    ("tracker", "says"),
    [("30", "names iter_0000030"), ("", "names nothing"), ("soon", "names soon")],
)
def test_a_tracker_that_names_none(tmp_path, tracker, says):
    iteration(tmp_path / "iter_0000010")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(UserError, match=says):
        iteration_folder(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such Megatron checkpoint folder"):
        iteration_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no iter_"):
        iteration_folder(tmp_path)


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"format fsdp_dtensor; save it as torch_dist"):
        iteration_folder(iteration(tmp_path / "iter_0000001", "fsdp_dtensor"))
    broken = iteration(tmp_path / "iter_0000002")
    (broken / "metadata.json").write_text("{")
    with pytest.raises(UserError, match=r"metadata\.json"):
        iteration_folder(broken)


def hf(folder: Path, **more: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"config.json": "{}", **more}.items():
        (folder / name).write_text(content)
    return folder


def test_where_the_config_is_looked_for(tmp_path):
    checkpoint = tmp_path / "megatron"
    saved = iteration(checkpoint / "iter_0000000")
    with pytest.raises(UserError, match="give the model's folder or hub name with --hf-path"):
        hf_config_of(checkpoint)
    (saved / "run_config.yaml").write_text(f"model: {{hf_model_id: {tmp_path}/gone}}")
    with pytest.raises(UserError, match=r"gone, which its run_config\.yaml names, is gone"):
        hf_config_of(checkpoint)
    (saved / "run_config.yaml").write_text(f"model: {{hf_model_id: {hf(tmp_path / 'named')}}}")
    assert hf_config_of(checkpoint) == str(tmp_path / "named")
    (saved / "run_config.yaml").write_text("model: {hf_model_id: Qwen/Qwen3-8B}")
    assert hf_config_of(checkpoint) == "Qwen/Qwen3-8B"
    hf(checkpoint)
    assert hf_config_of(saved) == str(checkpoint)
    hf(checkpoint / "hf_config")
    assert hf_config_of(saved) == hf_config_of(checkpoint) == str(checkpoint / "hf_config")
    assert hf_config_of(saved, "mine") == "mine"


def test_a_run_config_that_is_no_yaml(tmp_path):
    saved = iteration(tmp_path / "iter_0000000")
    (saved / "run_config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"cannot read .*run_config\.yaml"):
        hf_config_of(tmp_path)


def test_what_is_put_beside(tmp_path):
    words = {"tokenizer.json": "{}", "modeling_own.py": "pass", "generation_config.json": "{}"}
    left = {"README.md": "a card", "mbridge_prune.json": "{}", "model.safetensors": "", "pytorch_model.bin": "",
            "model.safetensors.index.json": "{}"}  # fmt: skip
    put_hf_config(hf(tmp_path / "model", **words, **left), tmp_path / "megatron")
    beside = tmp_path / "megatron" / "hf_config"
    assert sorted(p.name for p in beside.iterdir()) == sorted(["config.json", *words])
