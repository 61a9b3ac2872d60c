"""From a Megatron checkpoint and back: prune.py --megatron-path, --output-megatron-path, export.py."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import running
from end_to_end.conftest import plan_of, refused, snapshot, weights_of
from models import load, load_hf, write_hf
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

import mbridge_prune as mbp
from mbridge_prune.bridge.megatron import save_megatron

HF_FILES = ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json")
SIZES = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_layers": 3}


@pytest.fixture(scope="module")
def checkpoint(site, tmp_path_factory) -> Path:
    """The model of `site` as a Megatron checkpoint, written and then moved: nothing leads back to the original."""
    root = tmp_path_factory.mktemp("checkpoint")
    loaded = load(site / "model")
    save_megatron(loaded.bridge, loaded.model, root / "written", hf_folder=site / "model")
    (root / "written").rename(root / "moved")
    return root / "moved"


@pytest.fixture
def export(capsys):
    """`export(*arguments)`: launch/export.py in this process."""
    with running("export", capsys) as call:
        yield call


def assert_same_files(a: Path, b: Path, *names: str) -> None:
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def scores_in(run_folder: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """What a scores file says of itself, and its tensors' bits; safetensors writes the former in any order."""
    with safe_open(run_folder / "scores.safetensors", "np") as file:
        return file.metadata(), {name: file.get_tensor(name).tobytes() for name in file.keys()}


def megatron(base: list[str], path: object) -> list[str]:
    """The base arguments with a checkpoint in the place of the Hugging Face folder."""
    at = base.index("--hf-path")
    return [*base[:at], "--megatron-path", str(path), *base[at + 2 :]]


def test_the_same_scores_plan_and_export_bit_for_bit(run, base, site, checkpoint, tmp_path):
    sizes = ["--prune-export-config", json.dumps(SIZES)]
    assert run(*base, *sizes, "-o", tmp_path / "a").code == 0
    said = run(*megatron(base, checkpoint), *sizes, "-o", tmp_path / "b")
    assert said.code == 0, said.err
    assert f"import: {checkpoint}/iter_0000000" in said.out
    assert_same_files(tmp_path / "a" / "hf", tmp_path / "b" / "hf", *HF_FILES, "tokenizer_config.json")
    assert scores_in(tmp_path / "a") == scores_in(tmp_path / "b")
    a, b = plan_of(tmp_path / "a"), plan_of(tmp_path / "b")
    for plan in (a, b):
        for other in ("seconds", "settings"):
            del plan[other]
    assert a == b
    assert "already finished" in run(*megatron(base, checkpoint), *sizes, "-o", tmp_path / "b").out


def test_another_iteration_is_another_run(run, base, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "training")
    assert run(*megatron(base, tmp_path / "training")).code == 0
    shutil.copytree(tmp_path / "training" / "iter_0000000", tmp_path / "training" / "iter_0000010")
    (tmp_path / "training" / "latest_checkpointed_iteration.txt").write_text("10")
    assert "begun with other settings" in refused(run(*megatron(base, tmp_path / "training")))


def test_dry_run_reads_the_config_beside(run, base, checkpoint, tmp_path):
    said = run(*megatron(base, checkpoint), "--dry-run")
    assert said.code == 0, said.err
    parameters = sum(p.numel() for p in load_hf_config_only(checkpoint).parameters())
    assert f"{parameters:,}" in said.out
    assert not (tmp_path / "run").exists()


def load_hf_config_only(checkpoint: Path) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint / "hf_config"))


def test_a_pruned_checkpoint_goes_on_from_its_folder_alone(run, base, export, tmp_path):
    """Cut, moved away from its run, cut again, exported: each the same as on the Hugging Face road."""
    first = ["--prune-export-config", '{"hidden_size": 48}']
    second = ["--prune-export-config", '{"ffn_hidden_size": 64, "num_layers": 3}']
    assert run(*base, *first, "--output-megatron-path", tmp_path / "m", "-o", tmp_path / "one").code == 0
    shutil.copytree(tmp_path / "one" / "hf", tmp_path / "kept")
    (tmp_path / "m").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "one")

    said = export("--megatron-path", tmp_path / "moved", "--output", tmp_path / "back")
    assert said.code == 0, said.err
    assert_same_files(tmp_path / "back", tmp_path / "kept", *HF_FILES)
    record = json.loads((tmp_path / "back" / "mbridge_prune.json").read_text())
    assert (record["iteration"], record["dtype"]) == (0, "float32")
    assert "moved/iter_0000000" in (tmp_path / "back" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("w3 w4", add_special_tokens=False)[
        "input_ids"
    ] == [3, 4]

    assert run(*megatron(base, tmp_path / "moved"), *second, "-o", tmp_path / "a").code == 0
    assert run(*base, "--hf-path", tmp_path / "kept", *second, "-o", tmp_path / "b").code == 0
    assert_same_files(tmp_path / "a" / "hf", tmp_path / "b" / "hf", *HF_FILES)
    assert scores_in(tmp_path / "a") == scores_in(tmp_path / "b")


def test_exported_once_and_anew_when_the_checkpoint_is_another(export, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m")
    words = ["--megatron-path", tmp_path / "m", "--output", tmp_path / "hf"]
    assert export(*words).code == 0
    before = snapshot(tmp_path / "hf")
    assert "nothing to do" in export(*words).out
    assert snapshot(tmp_path / "hf") == before
    os.utime(tmp_path / "m" / "iter_0000000" / "metadata.json", (1, 1))
    assert "nothing to do" not in export(*words).out
    assert json.loads((tmp_path / "hf" / "mbridge_prune.json").read_text())["written"] == 1


def test_in_another_dtype(export, checkpoint, site, tmp_path):
    words = ["--megatron-path", checkpoint, "--output", tmp_path / "hf", "--dtype", "bfloat16"]
    assert export(*words).code == 0
    wanted = weights_of(site / "model")
    assert all(torch.equal(w, wanted[n].bfloat16()) for n, w in weights_of(tmp_path / "hf").items())


def test_a_checkpoint_in_half_precision_is_read_in_full(site, tmp_path):
    loaded = load(site / "model", params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16)
    save_megatron(loaded.bridge, loaded.model, tmp_path / "m", hf_folder=site / "model")
    again = mbp.load_mbridge_model_from_megatron(
        megatron_path=tmp_path / "m", provider_overrides={"seq_length": 16}
    )
    for mine, theirs in zip(
        again.unwrapped_model.parameters(), loaded.unwrapped_model.parameters(), strict=True
    ):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs.float())


def test_rows_that_pad_the_vocabulary(tmp_path):
    """Megatron-LM pads it to a multiple of 128 times the tensor parallel ranks; the config says what is real."""
    write_hf("llama", tmp_path / "hf")
    loaded = load(tmp_path / "hf")
    save_megatron(loaded.bridge, loaded.model, tmp_path / "m", hf_folder=tmp_path / "hf")
    config = tmp_path / "m" / "hf_config" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 100}))
    again = mbp.load_mbridge_model_from_megatron(
        megatron_path=tmp_path / "m", provider_overrides={"seq_length": 16}
    )
    rows = again.unwrapped_model.output_layer.weight
    assert torch.equal(rows, load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"][:100])


# What is wrong with it


@pytest.fixture
def broken(checkpoint, tmp_path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "broken")
    return tmp_path / "broken"


def shards(path: Path) -> list[Path]:
    return sorted((path / "iter_0000000").glob("*.distcp"))


@pytest.mark.parametrize("command", ["prune", "export"])
def test_a_missing_and_a_shortened_shard(run, base, export, broken, tmp_path, command):
    def said():
        words = ["--megatron-path", broken, "--output", tmp_path / "run"]
        return refused(run(*megatron(base, broken)) if command == "prune" else export(*words))

    shard = shards(broken)[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    assert f"{shard} is cut short" in said()
    shard.unlink()
    assert f"lacks {shard.name}" in said()
    shard.write_bytes(content)
    (broken / "iter_0000000" / ".metadata").write_bytes(b"noise")
    assert "cannot read the index" in said()
    assert not (tmp_path / "run").exists()


def test_a_missing_config(run, base, export, broken, site, tmp_path):
    shutil.rmtree(broken / "hf_config")
    wanted = "give the model's folder or hub name with --hf-path"
    assert wanted in refused(run(*megatron(base, broken)))
    assert wanted in refused(export("--megatron-path", broken, "--output", tmp_path / "hf"))
    assert run(*base, "--megatron-path", broken).code == 0  # base has the --hf-path
    said = export("--megatron-path", broken, "--hf-path", site / "model", "--output", tmp_path / "hf")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("llama_tied", {"intermediate_size": 80}, "linear_fc1.weight is (4, 192, 64), expected (4, 160, 64)"),
        ("llama_tied", {"num_hidden_layers": 3}, "is (4, "),
        ("llama_tied", {"vocab_size": 200}, "word_embeddings.weight is (128, 64), expected (200, 64)"),
        ("llama", {}, "output_layer.weight is not there"),
        ("qwen3_moe", {}, "decoder.layers.0.self_attention.linear_proj.weight is not there"),
    ],
)
def test_another_architecture(export, checkpoint, tmp_path, family, changes, says):
    write_hf(family, tmp_path / "other", **changes)
    words = ["--megatron-path", checkpoint, "--hf-path", tmp_path / "other", "--output", tmp_path / "hf"]
    line = refused(export(*words))
    assert "is not the model that" in line and str(tmp_path / "other") in line
    assert says in line
    assert not (tmp_path / "hf").exists()


def test_folders_that_are_not_empty_stay(export, checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert "is not empty" in refused(export("--megatron-path", checkpoint, "--output", tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_wrong_words(export, checkpoint, tmp_path):
    assert "no such Megatron checkpoint" in refused(
        export("--megatron-path", "/no/such", "-o", tmp_path / "hf")
    )
    words = ["--megatron-path", checkpoint, "-o", tmp_path / "hf"]
    assert "--pp must be at least 1" in refused(export(*words, "--pp", "0"))
    assert "world size 1 is not a multiple" in refused(export(*words, "--tp", "2"))
    assert not (tmp_path / "hf").exists()


def test_a_full_disk(export, checkpoint, tmp_path):
    """As the system says it: no file of this process may grow beyond 10,000 bytes."""
    import resource
    import signal

    before, old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        line = refused(export("--megatron-path", checkpoint, "--output", tmp_path / "hf"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert "cannot write the model to" in line and "nothing was left there" in line
    assert not list(tmp_path.iterdir())
    assert export("--megatron-path", checkpoint, "--output", tmp_path / "hf").code == 0
    assert load_hf(tmp_path / "hf").config.num_hidden_layers == 4
