"""A distillation from start to end, against transformers' autograd; taken up again; whatever is refused."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from distill.conftest import LENGTH, arguments, copied, losses, save_tokenizer, write_dataset
from distill.test_distill_layouts import forget_the_end
from end_to_end.conftest import refused
from models import difference, load, load_hf, write_hf
from transformers import AutoTokenizer, LlamaConfig, Qwen3Config

from mbridge_prune import config
from mbridge_prune.bridge.training_loop import TRAINING, import_bridge
from mbridge_prune.distill import progress
from mbridge_prune.distill.settings import DISTILLATIONS, Settings, check


@pytest.fixture(scope="module")
def finished(site, tmp_path_factory):
    """A run of six steps."""
    from commands import launched

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert launched("distill").main(arguments(site, folder)) == 0
    return folder


def test_warnings_are_heard_after_a_run(finished, caplog):
    logging.getLogger("mbridge_prune").warning("a checkpoint lost a file")
    assert "a checkpoint lost a file" in caplog.text


def first_batch(site, tmp_path, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) [n, LENGTH] of the first step."""
    from megatron.bridge.training.config import DatasetBuildContext

    from mbridge_prune.blends import blend
    from mbridge_prune.distill.data import IndexedData

    data = IndexedData(train=blend([str(site / "train")]), seq_length=LENGTH, cache=str(tmp_path / "cache"))
    context = DatasetBuildContext(train_samples=n, valid_samples=0, test_samples=0)
    train, valid, test = data.build_datasets(context)
    assert valid is None and test is None
    return tuple(torch.stack([train[i][key] for i in range(n)]) for key in ("tokens", "labels"))


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_gradients_are_those_of_autograd_in_transformers(site, tmp_path, monkeypatch, distil, weight):
    from megatron.core.utils import unwrap_model

    kept: dict[str, torch.Tensor] = {}

    def keep(self, context):
        module = unwrap_model(context.model)[0].module
        bridge = kept.pop("bridge")
        with torch.no_grad():  # the gradients go out as weights would
            for p in module.parameters():
                p.copy_(p.main_grad)
        kept.update(bridge.export_hf_weights([module], cpu=True, show_progress=False))

    from mbridge_prune.distill import models as ours

    original = ours.Student.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        kept["bridge"] = self.bridge

    monkeypatch.setattr(ours.Student, "__init__", init)
    monkeypatch.setattr(progress.Progress, "on_train_step_end", keep)
    more = ("--steps", 1, "--warmup-steps", 0, "--clip-grad", 0, "--lm-weight", weight, "--eval-iters", 0)
    assert distil(*arguments(site, tmp_path / "run", *more)).code == 0

    tokens, labels = first_batch(site, tmp_path, 4)
    teacher, student = load_hf(site / "teacher"), load_hf(site / "student")
    with torch.no_grad():
        log_p = F.log_softmax(teacher(tokens).logits, -1)
    out = student(tokens).logits
    kd = F.kl_div(F.log_softmax(out, -1), log_p, reduction="none", log_target=True).sum(-1).mean()
    lm = F.cross_entropy(out.flatten(0, 1), labels.flatten())
    ((1 - weight) * kd + weight * lm).backward()
    names = [name for name, _ in student.named_parameters()]
    assert {n for n in kept if n != "lm_head.weight"} == set(names)  # tied
    for name, p in student.named_parameters():
        assert difference(kept[name].detach(), p.grad) < 1e-4, name


def test_what_a_run_leaves(finished, site):
    lines = losses(finished)
    assert [line["step"] for line in lines if "train" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "valid" in line] == [3, 6]
    first, last = (line["valid"]["loss"] for line in lines if "valid" in line)
    assert last < first
    result = json.loads((finished / "distill.json").read_text())
    assert result["steps"] == 6 and result["tokens"] == 6 * 4 * LENGTH
    assert result["last_validation"] == {"step": 6, **lines[-1]["valid"]}
    assert list((finished / "tensorboard").glob("events.*"))
    page = (finished / "report.html").read_text()
    assert "Loss curves" in page and "Lm loss" in page
    assert "distilled from its parent" in (finished / "hf" / "README.md").read_text()
    kept = sorted(p.name for p in (finished / "checkpoints").glob("iter_*"))
    assert kept == ["iter_0000003", "iter_0000006"]


def test_the_model_speaks_in_plain_transformers_and_its_loss_is_the_validated_one(finished, site, tmp_path):
    from megatron.bridge.training.config import DatasetBuildContext

    from mbridge_prune.blends import blend
    from mbridge_prune.distill.data import IndexedData

    student, teacher = load_hf(finished / "hf"), load_hf(site / "teacher")
    assert student.config.num_hidden_layers == 3 and student.config.intermediate_size == 64
    data = IndexedData(
        train=blend([str(site / "train")]), valid=blend([str(site / "valid")]), valid_samples=4,
        seq_length=LENGTH, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    _, valid, _ = data.build_datasets(DatasetBuildContext(train_samples=4, valid_samples=0, test_samples=0))
    tokens, labels = (torch.stack([valid[i][key] for i in range(4)]) for key in ("tokens", "labels"))
    assert torch.equal(valid[0]["tokens"], valid[4]["tokens"])  # the same samples again and again
    with torch.no_grad():
        ours, theirs = student(tokens).logits, teacher(tokens).logits
    kd = F.kl_div(F.log_softmax(ours, -1), F.log_softmax(theirs, -1), reduction="none", log_target=True)
    said = losses(finished)[-1]["valid"]
    assert said["loss"] == pytest.approx(float(kd.sum(-1).mean()), rel=1e-4)
    lm = F.cross_entropy(ours.flatten(0, 1), labels.flatten())
    assert said["lm loss"] == pytest.approx(float(lm), rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(finished / "hf")
    inputs = tokenizer("w5 w6 w7", return_tensors="pt", return_token_type_ids=False)
    assert student.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > 3


def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(finished, site, tmp_path, distil):
    again = copied(finished, tmp_path / "again")
    forget_the_end(again)
    half_written = again / "checkpoints" / "iter_0000005"
    half_written.mkdir()
    (half_written / "__0_0.distcp").write_bytes(b"cut")
    said = distil(*arguments(site, again))
    assert said.code == 0 and "going on from the checkpoint of step 3" in said.out, said
    assert not half_written.exists()
    assert losses(again) == losses(finished)
    for file in ("hf/model.safetensors", "hf/config.json"):
        assert (again / file).read_bytes() == (finished / file).read_bytes()


def test_blends_without_weights_last_for_more_than_an_epoch(site, tmp_path, distil):
    """Each dataset has a share of the samples like its share of the tokens."""
    from mbridge_prune.distill.data import weighed

    both = f"{site / 'train'},{site / 'other'}"
    sizes = [(site / f"{name}.bin").stat().st_size / 2 for name in ("train", "other")]  # two bytes a token
    assert weighed(both.split(",")) == (both.split(","), sizes)
    epoch = sum(sizes) // LENGTH // 16  # steps of 16 sequences
    more = ("--data", both, "--valid-data", both, "--gbs", 16, "--mbs", 16, "--eval-iters", 2 * int(epoch))
    said = distil(
        *arguments(site, tmp_path / "run", *more, "--steps", 2 * int(epoch), "--eval-interval", 1000)
    )
    assert said.code == 0, said
    assert losses(tmp_path / "run")[-1]["step"] == 2 * epoch > 10


def test_a_stop_file_ends_a_run_behind_a_checkpoint(finished, site, tmp_path, distil):
    stop, run = tmp_path / "stop", tmp_path / "run"
    stop.touch()
    said = distil(*arguments(site, run, "--stop-file", stop))
    assert said.code == 143 and "told to stop; a checkpoint was written" in said.out, said
    assert [p.name for p in (run / "checkpoints").glob("iter_*")] == ["iter_0000001"]
    stop.unlink()
    assert distil(*arguments(site, run, "--stop-file", stop)).code == 0
    assert losses(run) == losses(finished)


def test_a_finished_run_says_so_and_another_one_is_refused(finished, site, distil):
    assert "already finished" in distil(*arguments(site, finished, "--log-interval", 1)).out
    assert "begun with other settings" in refused(distil(*arguments(site, finished, "--lr", "2e-3")))


@pytest.mark.parametrize("form", ["run folder", "folder of iterations", "iteration"])
def test_forms_of_a_megatron_student(finished, form):
    from mbridge_prune.distill.models import find_student

    last = finished / "checkpoints" / "iter_0000006"
    path = {"run folder": finished, "folder of iterations": last.parent, "iteration": last}[form]
    settings, _ = config.from_command_line(["--teacher", "t", "--steps", "200", "--eval-iters", "0",
                                            "--megatron-path", str(path)], Settings)  # fmt: skip
    check(settings)
    find_student(settings)
    assert settings.model.student_megatron == str(last)
    assert settings.model.student == str(last.parent / "hf_config")


def test_a_student_from_a_megatron_checkpoint(finished, site, tmp_path, distil):
    megatron = copied(finished, tmp_path / "megatron")
    shutil.rmtree(megatron / "hf")  # what lies beside the checkpoints is enough
    more = ("model.student=null", "--megatron-path", megatron, "--steps", 1, "--warmup-steps", 0)
    said = distil(*arguments(site, tmp_path / "run", *more, "--eval-iters", 0))
    assert said.code == 0, said
    end = copied(finished, tmp_path / "from_hf")
    more = ("--student", end / "hf", "--steps", 1, "--warmup-steps", 0, "--eval-iters", 0)
    assert distil(*arguments(site, tmp_path / "run_hf", *more)).code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "run_hf")
    weights = [load_hf(tmp_path / run / "hf").state_dict() for run in ("run", "run_hf")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_without_a_checkpoint_a_run_does_not_say_that_it_goes_on_from_one(
    site, tmp_path, distil, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    import_bridge(TRAINING)
    monkeypatch.setattr(importlib.import_module("megatron.bridge.training.pretrain"), "pretrain", full)
    line = refused(distil(*arguments(site, tmp_path / "run")))
    assert "No space left on device" in line
    assert line.strip().endswith("the same command begins anew: no checkpoint was written yet")


def test_nan_stops_with_one_line_and_no_checkpoint(site, tmp_path, distil, monkeypatch):
    from mbridge_prune.distill import pair

    original, calls = pair.divergence, []

    def broken(*args, **kwargs):
        calls.append(1)
        found = original(*args, **kwargs)
        return found if len(calls) < 9 else type(found)(found.kd * math.nan, found.lm)

    monkeypatch.setattr(pair, "divergence", broken)
    line = refused(distil(*arguments(site, tmp_path / "run", "--eval-iters", 0)))
    assert "stopped at step 5: the gradient's norm is nan" in line and "goes on from" in line
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("iter_*")] == ["iter_0000003"]


def test_a_dry_run_prints_plan_and_memory_and_writes_nothing(site, tmp_path, distil):
    more = ("--tokens", "80e9", "--seq-length", 8192, "--gbs", 768, "--warmup-steps", 100, "--dry-run")
    words = [w for w in arguments(site, tmp_path / "run", *more) if w not in ("--steps", "6")]
    said = distil(*words)
    assert said.code == 0, said
    assert re.search(r"steps +│ +12,716 ", said.out), said.out  # 80e9 / (8192 x 768)
    assert "memory a rank" in said.out and not (tmp_path / "run").exists()


PARENTS = {
    "qwen3-8b-to-6b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, architectures=["Qwen3ForCausalLM"],
    ),
    "llama-3.1-8b-to-4.5b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"],
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe", sorted(path.stem for path in DISTILLATIONS.glob("*.yaml")))
def test_a_dry_run_of_a_recipe_needs_neither_gpus_nor_data_nor_weights(recipe, tmp_path, distil):
    parent = PARENTS[recipe]
    parent.save_pretrained(tmp_path / "parent")
    child = copy.deepcopy(parent)
    child.intermediate_size //= 2
    child.save_pretrained(tmp_path / "child")
    said = distil("--recipe", recipe, "--teacher", tmp_path / "parent", "--student", tmp_path / "child", "--dry-run",
                  "--world-size", 8, "--gbs", 768)  # fmt: skip
    assert said.code == 0, said
    assert re.search(r"ranks +│ 8 = tensor", said.out) and re.search(r"dtype +│ +bfloat16", said.out)
    stages = re.findall(r"^│ +\d (?:[│ ]+[\d.]+)+ │$", said.out, re.M)
    teacher = sum(float(line.split("│")[2]) for line in stages)
    settings, _ = config.from_command_line(["--recipe", recipe], Settings)
    assert len(stages) == settings.parallel.pp
    params = {"qwen3-8b-to-6b": 8.19e9, "llama-3.1-8b-to-4.5b": 8.03e9, "smollm2-135m": 0.1345e9}[recipe]
    assert teacher == pytest.approx(params * 2 / settings.parallel.tp / 2**30, rel=0.05)


REFUSED = {
    "no student": (["model.student=null"], "give --student-hf-path or --student-megatron-path"),
    "no teacher": (["model.teacher=null"], "no teacher"),
    "no steps": (["train.steps=null"], "give one of --tokens"),
    "both": (["--tokens", "1e6"], "give one of --tokens"),
    "tokens": (["train.steps=null", "--tokens", "many"], "is no number"),
    "batch": (["--gbs", "5"], "nearest multiple: 4"),
    "world": (["--tp", "2"], "start a multiple of 2 processes"),
    "another world": (["--world-size", "64"], "this job has 1 ranks"),
    "sequence parallel": (["--sequence-parallel"], "needs --tp of 2"),
    "warm-up": (["--warmup-steps", "6"], "leaves nothing of 6 steps"),
    "weight": (["--lm-weight", "1.5"], "is no share"),
    "nothing from the teacher": (["--lm-weight", "1"], "leaves nothing to learn"),
    "temperature": (["--temperature", "0"], "must be at least 0.001"),
    "rate": (["--min-lr", "1"], "is above train.lr"),
    "no data": (["data.train=[]"], "no data"),
    "no validation data": (["data.valid=[]"], "--eval-iters 0"),
    "missing data": (["--data", "/no/such"], "/no/such.bin is missing"),
    "blend": (["--data", "0.5,a,b"], "neither prefix,prefix"),
    "output": (["output.path=null"], "no output folder"),
    "recipe": (["--recipe", "nothing"], "is not in distill/"),
    "cp on the CPU": (["--cp", "2"], "use --cp 1"),
    "sequence parallel on the CPU": (["--sequence-parallel", "--tp", "2"], "leave it off"),
    "bf16 on the CPU": (["--dtype", "bfloat16"], "use float32"),
    "no experts": (["--ep", "2", "--tp", "1"], "not a multiple of pipeline 1 x expert 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(site, tmp_path, distil, name):
    more, line = REFUSED[name]
    assert line in refused(distil(*arguments(site, tmp_path / "run", *more)))
    assert not (tmp_path / "run").exists()


def test_students_that_are_no_children_are_refused(site, tmp_path, distil):
    write_hf("llama_tied", tmp_path / "other_size", vocab_size=96)
    said = refused(distil(*arguments(site, tmp_path / "run", "--student", tmp_path / "other_size")))
    assert "is no child of" in said and "96 tokens" in said
    other_words = copied(site / "student", tmp_path / "other_words")
    save_tokenizer(other_words, swapped=True)
    said = refused(distil(*arguments(site, tmp_path / "run", "--student", other_words)))
    assert "number words differently" in said
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named(site, tmp_path, distil):
    student = copied(site / "student", tmp_path / "student")
    load_hf(student).save_pretrained(student, max_shard_size="100KB")
    (student / "model.safetensors").unlink(missing_ok=True)
    gone = sorted(student.glob("model-*.safetensors"))[-1]
    gone.unlink()
    said = refused(distil(*arguments(site, tmp_path / "run", "--student", student)))
    assert f"lacks {gone.name}" in said


def test_data_of_another_tokenizer_is_refused(site, tmp_path, distil):
    write_dataset(tmp_path / "big", 3, 0, vocab=4096)
    assert "the models know 0 to 127" in refused(
        distil(*arguments(site, tmp_path / "run", "--data", tmp_path / "big"))
    )
    for suffix in (".bin", ".idx"):
        shutil.copy(site / f"train{suffix}", tmp_path / f"foreign{suffix}")
    (tmp_path / "foreign.json").write_text(json.dumps({"vocabulary": "another", "tokenizer": "x/y"}))
    said = refused(distil(*arguments(site, tmp_path / "run", "--data", tmp_path / "foreign")))
    assert "was made with another tokenizer (x/y)" in said


def test_a_student_as_prune_writes_it_for_megatron(site, tmp_path, distil):
    from mbridge_prune.bridge.megatron import save_megatron

    loaded = load(site / "student", moe_grouped_gemm=True)
    save_megatron(loaded.bridge, loaded.model, tmp_path / "megatron", hf_folder=site / "student")
    more = ("--steps", 1, "--warmup-steps", 0, "--eval-iters", 0)
    path = ("--student-megatron-path", tmp_path / "megatron")
    assert distil(*arguments(site, tmp_path / "run", *path, *more)).code == 0
    assert distil(*arguments(site, tmp_path / "run_hf", *more)).code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "run_hf")
    line = refused(distil(*arguments(site, tmp_path / "other", "--student-megatron-path", site, *more)))
    assert "is no Megatron checkpoint" in line
    gone = next((tmp_path / "megatron").glob("iter_*/*.distcp"))
    gone.unlink()
    assert f"lacks {gone.name}" in refused(distil(*arguments(site, tmp_path / "other", *path, *more)))
    assert not (tmp_path / "other").exists()
    shutil.rmtree(tmp_path / "megatron" / "hf_config")
    line = refused(distil(*arguments(site, tmp_path / "other", "model.student=null", *path, *more)))
    assert "hf_config, which its run_config.yaml names, is gone" in line and "--student-hf-path" in line
