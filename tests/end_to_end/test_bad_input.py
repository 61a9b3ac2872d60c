"""Whatever is wrong with a request is one line on stderr and exit code 2, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from distributed.launching import python
from end_to_end.conftest import refused, snapshot
from models import write_hf
from safetensors.torch import save_file

from mbridge_prune.dynamic.module import _REGISTRY

MODEL, TEXT = "--hf-path", "--calib-data"
SIZES = "--prune-export-config"

WRONG_WORDS = {  # more arguments -> what the line must say
    "unknown flag": (["--calib-num-sample", "3"], "'--calib-num-sample' (did you mean '--calib-num-samples'?)"),
    "stray word": (["prune"], "unknown argument 'prune'"),
    "unknown dot key": (["calibration.num_sampels=3"], "did you mean 'num_samples'"),
    "unknown section": (["calibraton.num_samples=3"], "did you mean 'calibration"),
    "key below a value": (["calibration.num_samples.x=3"], "holds no further keys"),
    "text for a number": (["--calib-num-samples", "many"], "'many' is not an integer"),
    "float for a number": (["--calib-num-samples", "2.5"], "2.5 is not an integer"),
    "zero": (["--calib-batch-size", "0"], "must be at least 1"),
    "negative": (["--seq-length=-4"], "must be at least 1"),
    "no boolean": (["--skip-sorting", "perhaps"], "'perhaps' is not true or false"),
    "flag without value": (["--pp"], "--pp"),
    "unknown importance": (["--importance", "minitrn"], "did you mean 'minitron'"),
    "ranking of no experts": (["--experts", "gate_free"], "no routed experts; leave it out"),
    "unknown repair": (["--repair", "magic"], "choices: auto, none, norm, least_squares, sequential"),
    "unknown dtype": (["--dtype", "bfloat61"], "did you mean 'bfloat16'"),
    "unknown recipe": (["--recipe", "smolm2-135m"], "did you mean 'smollm2-135m'"),
    "missing config": (["--config", "/no/such.yaml"], "no such config file: /no/such.yaml"),
    "bad JSON": ([SIZES, "{hidden_size: 3"], "is not valid JSON"),
    "JSON that is no mapping": ([SIZES, "[3]"], "is not a mapping"),
    "no sizes": ([SIZES, "{}"], "nothing to prune"),
    "missing model": ([MODEL, "/no/such/model"], "no such model folder: /no/such/model"),
    "text missing in a mixture": ([TEXT, "0.7,wikitext,0.3,/no/such.txt"], "no such calibration data: /no/such.txt"),
    "sums of no repair": (["--repair", "norm", "--repair-offload"], "no effect with --repair norm"),
    "half a weight": ([TEXT, "0.7,/no/such.txt,/no/other.txt"], "is neither source,source"),
    "missing text": ([TEXT, "/no/such.txt"], "no such calibration data: /no/such.txt"),
    "unknown hparam": ([SIZES, '{"ffn_hiden_size": 32}'], "did you mean 'ffn_hidden_size'"),
    "unknown dot hparam": (["prune.export_config.hiden_size=32"], "did you mean 'hidden_size'"),
    "hparam of other models": ([SIZES, '{"num_moe_experts": 2}'], "num_moe_experts is no dimension of GPTModel"),
    "heads not in groups": ([SIZES, '{"num_attention_heads": 3}'], "not a multiple of its 2 groups"),
    "too many layers": ([SIZES, '{"num_layers": 5}'], "num_layers=5 is outside 1..4"),
    "size zero": ([SIZES, '{"hidden_size": 0}'], "hidden_size=0 is outside 1..64"),
    "size negative": ([SIZES, '{"hidden_size": -8}'], "hidden_size=-8 is outside 1..64"),
    "size float": ([SIZES, '{"hidden_size": 32.5}'], "hidden_size=32.5 is not an integer"),
    "size infinite": ([SIZES, '{"hidden_size": Infinity}'], "hidden_size=inf is not an integer"),
    "size true": ([SIZES, '{"hidden_size": true}'], "hidden_size=True is not an integer"),
    "size text": ([SIZES, '{"hidden_size": "half"}'], "hidden_size='half' is not an integer"),
    "size null": (["prune.export_config.hidden_size=null"], "hidden_size=None is not an integer"),
    "divisor violated": (["--hidden-size-divisor", "32", SIZES, '{"hidden_size": 40}'], "nearest choices: 32, 64"),
    "tensor parallel": (["--tp", "2"], "prune from that scores file"),
    "weighted ranking of shards": (
        ["--tp", "2", "--score-only", "--prune-export-config", "{}"], "reads whole weights: use --tp 1",
    ),
    "expert parallel": (["--ep", "2"], "the model has no experts; use --ep 1"),
    "world too small": (["--pp", "2"], "world size 1 is not a multiple of pipeline 2"),
    "layers do not divide": (["--pp", "3"], "4 layers do not divide over 3 pipeline stages; set --num-layers-in-first-pipeline-stage 2,"),
    "stages do not add up": (
        ["--pp", "2", "parallel.num_layers_in_first_pipeline_stage=1", "parallel.num_layers_in_last_pipeline_stage=1"],
        "with 1 in the first and 1 in the last; leave --num-layers-in-first-pipeline-stage and"),
    "too little text": (["--calib-num-samples", "100"], "100"),
    "microbatches do not divide": (["--calib-batch-size", "3"], "choose a multiple of 3"),
    "search flag without a search": (["--top-k", "3"], "--top-k is of a search and has no effect here"),
    "score without a search": (["--prune-score-func", "loss"], "--prune-score-func is of a search"),
    "no MMLU": (["--prune-target-params", "70%", "--prune-score-func", "mmlu_10pct_bs1", "--mmlu-data", "/no/mmlu"],
                "no such folder of MMLU data: /no/mmlu"),
    "empty MMLU": (["--prune-target-params", "70%", "--prune-score-func", "mmlu_10pct_bs1", "--mmlu-data", "/proc/1/task"],
                   "/proc/1/task holds no test questions"),
    "MMLU for another score": (["--prune-target-params", "70%", "--mmlu-data", "/proc"], "but the score is kl"),
    "score of no module": (["--prune-target-params", "70%", "--prune-score-func", "no_such_module:f"],
                           "no module 'no_such_module'"),
    "score of no function": (["--prune-target-params", "70%", "--prune-score-func", "json:dmps"], "did you mean 'dumps'"),
    "filter of no function": (["--prune-target-params", "70%", "--candidate-filter", "json:lods"], "did you mean 'loads'"),
    "unknown score": (["--prune-target-params", "70%", "--prune-score-func", "los"], "did you mean 'loss'"),
    "missing scores": (["calibration.data=null"], "no calibration text (--calib-data) and no scores file"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_wrong_words(run, base, site, tmp_path, case):
    more, says = WRONG_WORDS[case]
    before = snapshot(site, tmp_path)
    assert says in refused(run(*base, *more))
    assert snapshot(site, tmp_path) == before


@pytest.mark.parametrize("case", ["unknown hparam", "heads not in groups", "too many layers", "divisor violated",
                                  "tensor parallel", "layers do not divide", "missing model", "size text",
                                  "search flag without a search", "no MMLU", "unknown score", "missing text", "empty MMLU",
                                  "MMLU for another score", "score of no module", "score of no function",
                                  "filter of no function", "ranking of no experts"])  # fmt: skip
def test_a_dry_run_refuses_the_same(run, base, tmp_path, case):
    more, says = WRONG_WORDS[case]
    assert says in refused(run(*base, *more, "--dry-run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("calibration: {num_sampels: 3}", "did you mean 'num_samples'"),
        ("calibratoin: {num_samples: 3}", "did you mean 'calibration.num_samples'"),
        ("calibration: {num_samples: [3]}", "is not an integer"),
        ("calibration: 3", "calibration"),
        ("calibration: {num_samples: 3", "is not valid YAML"),
        ("a: b: c", "is not valid YAML"),
        ("- 3", "holds no settings"),
        ("", "holds no settings"),
        ("\x00\x01", "is not valid YAML"),
        ("prune: {export_config: 7}", "is not a mapping"),
        ("prune: {hidden_size_divisor: 0}", "must be at least 1"),
        ("output: {path: {a: b}}", "is not a text value"),
    ],
)
def test_wrong_config_files(run, base, tmp_path, content, says):
    (tmp_path / "mine.yaml").write_text(content)
    before = snapshot(tmp_path)
    line = refused(run("--config", tmp_path / "mine.yaml", *base))
    assert says in line and "mine.yaml" in line
    assert snapshot(tmp_path) == before


def test_no_model_and_no_output(run, site):
    assert "give --hf-path FOLDER" in refused(run())
    line = refused(run(MODEL, site / "model", SIZES, '{"hidden_size": 32}', TEXT, site / "text.txt"))
    assert "give --output, --output-hf-path" in line


@pytest.fixture
def broken(site, tmp_path):
    """A copy of the model to break, outside the folders a run may write."""
    shutil.copytree(site / "model", tmp_path / "broken")
    return tmp_path / "broken"


def test_corrupt_safetensors(run, base, broken, tmp_path):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    line = refused(run(*base, MODEL, broken))
    assert "model.safetensors is not a readable safetensors file" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
            "does not know the architecture BertForMaskedLM",
        ),
        ({"architectures": ["LlamaForCausalLN"]}, "did you mean 'LlamaForCausalLM'"),
        ({"model_type": "made_up_9"}, "made_up_9"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_unknown_architectures(run, base, broken, tmp_path, config, says, dry):
    file = broken / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    assert says in refused(run(*base, MODEL, broken, *dry))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["{", ""])
def test_broken_model_config(run, base, broken, tmp_path, content):
    (broken / "config.json").write_text(content)
    assert "broken" in refused(run(*base, MODEL, broken))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_model_folder(run, base, broken, tmp_path, missing):
    (broken / missing).unlink()
    assert missing.rpartition(".")[2] in refused(run(*base, MODEL, broken))
    assert not (tmp_path / "run").exists()


def test_a_layer_without_a_wrapper_is_named(run, base, site, tmp_path, monkeypatch):
    monkeypatch.delitem(_REGISTRY, ("megatron", "megatron.core.transformer.moe.router.TopKRouter"))
    write_hf("qwen3_moe", tmp_path / "moe")
    line = refused(run(*base, MODEL, tmp_path / "moe", "--prune-export-config", '{"hidden_size": 48}'))
    assert "decoder.layers.0.mlp.router: TopKRouter has weight" in line and "TEGroupedMLP" in line
    assert not (tmp_path / "run").exists()


def test_scores_of_another_model(run, base, site, tmp_path):
    assert run(*base).code == 0
    write_hf("llama_tied", tmp_path / "other", seed=4)
    scores = tmp_path / "run" / "scores.safetensors"
    before = scores.read_bytes()
    line = refused(run(*base, MODEL, tmp_path / "other", "-o", tmp_path / "two", "--scores", scores))
    assert "scores of another model" in line
    assert scores.read_bytes() == before
    assert not (tmp_path / "two" / "hf").exists()


@pytest.mark.parametrize("kind", ["noise", "other file"])
def test_broken_scores_files(run, base, tmp_path, kind):
    scores = tmp_path / "scores.safetensors"
    if kind == "noise":
        scores.write_bytes(b"no scores at all")
    else:
        save_file({"x": torch.zeros(2)}, scores)
    before = scores.read_bytes()
    line = refused(run(*base, "--scores", scores))
    assert str(scores) in line and "scores file" in line
    assert scores.read_bytes() == before
    assert not (tmp_path / "run" / "hf").exists()


@pytest.mark.parametrize("flag", ["--output", "--output-hf-path", "--output-megatron-path"])
def test_folders_that_are_not_empty(run, base, tmp_path, flag):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    assert f"{tmp_path}/mine is not empty" in refused(run(*base, flag, tmp_path / "mine"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flag", ["--output", "--output-hf-path", "--output-megatron-path"])
def test_outputs_that_are_files(run, base, tmp_path, flag):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    assert "thesis.tex" in refused(run(*base, flag, tmp_path / "thesis.tex"))
    assert snapshot(tmp_path) == before


def test_a_run_folder_of_other_settings(run, base, tmp_path):
    assert run(*base).code == 0
    before = snapshot(tmp_path)
    assert "begun with other settings" in refused(run(*base, "prune.export_config.ffn_hidden_size=48"))
    assert snapshot(tmp_path) == before


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("writer", "spared"),
    [
        ("mbridge_prune.files.save_tensors", ("scores.safetensors", "hf", "plan.json")),
        ("mbridge_prune.bridge.export.save_tensors", ("hf", "plan.json")),
        ("mbridge_prune.bridge.export._finish", ("hf", "plan.json")),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(run, base, tmp_path, monkeypatch, writer, spared):
    def full(*arguments, **more):
        for thing in arguments:  # half the file is there already when the disk is full
            if isinstance(thing, os.PathLike) and not os.path.isdir(thing):
                with open(thing, "wb") as file:
                    file.write(b"half")
        raise FULL

    with monkeypatch.context() as disk:
        disk.setattr(writer, full)
        line = refused(run(*base))
    assert "No space left on device" in line
    for name in spared:
        assert not (tmp_path / "run" / name).exists()
    assert not [p for p in (tmp_path / "run").glob(".*")], "something was left aside"
    assert run(*base).code == 0, "the same command goes on once there is room"
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["settings.json", "plan.json", "hf", "scores.safetensors"])
def test_a_disk_that_is_full_at_the_last_moment(run, base, tmp_path, monkeypatch, name):
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise FULL
        replace(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", full)
        assert "No space left on device" in refused(run(*base))
    assert not (tmp_path / "run" / name).exists()
    assert run(*base).code == 0
    assert (tmp_path / "run" / name).exists()


@pytest.mark.parametrize("case", ["unknown flag", "too many layers", "world too small"])
def test_as_a_process(base, tmp_path, case):
    more, says = WRONG_WORDS[case]
    done = python("launch/prune.py", *base, *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    assert says in done.stderr
    assert not (tmp_path / "run").exists()
