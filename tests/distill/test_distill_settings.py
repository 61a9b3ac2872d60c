"""The settings of a distillation: one spelling a key, recipes that can be read, the published advice as defaults."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from mbridge_prune.config import from_command_line, parser
from mbridge_prune.distill.forecast import memory
from mbridge_prune.distill.models import end_stages
from mbridge_prune.distill.settings import DISTILLATIONS, Settings, check, what_is_learnt
from mbridge_prune.errors import UserError

RECIPES = sorted(path.stem for path in DISTILLATIONS.glob("*.yaml"))


def settings(*words: str) -> Settings:
    return from_command_line(words, Settings)[0]


def test_every_key_has_a_flag_and_no_flag_is_shared():
    actions = {a.dest: a.option_strings for a in parser(Settings)._actions}
    keys = {
        f"{s.name}.{f.name}"
        for s in dataclasses.fields(Settings)
        for f in dataclasses.fields(s.default_factory)
    }
    assert keys <= set(actions)
    flags = [flag for strings in actions.values() for flag in strings]
    assert len(flags) == len(set(flags))


def test_the_defaults_are_the_published_advice():
    made = Settings()
    assert (made.data.seq_length, made.train.global_batch_size, made.train.warmup_steps) == (8192, 768, 100)
    assert (made.train.lr, made.train.min_lr, made.train.schedule) == (1e-4, 1e-5, "linear")


@pytest.mark.parametrize(
    ("tokens", "steps"), [("80e9", 12716), ("6291456", 1), ("6291457", 2), ("1e11", 15895)]
)
def test_steps_are_tokens_by_tokens_a_step_rounded_up(tokens, steps):
    assert settings("--tokens", tokens).steps() == steps


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_whole_and_every_key_has_a_comment(recipe):
    made = settings("--recipe", recipe, "--teacher", "t", "--student", "s", "--valid-data", "v")
    check(made)
    lines = (DISTILLATIONS / f"{recipe}.yaml").read_text().splitlines()
    for line in lines:
        if line.startswith("  ") and not line.lstrip().startswith("#"):
            assert " # (" in line, line
            kind = line.partition(" # (")[2].partition(",")[0]
            assert kind in ("str", "int", "float", "bool", "list"), line


def test_exponents_are_numbers_in_yaml_too(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("train: {lr: 3e-4, tokens: 80e9}")
    made = settings("--config", str(file))
    assert made.train.lr == 3e-4 and made.steps() == 12716
    assert yaml.safe_load("3e-4") == "3e-4"  # why this needs a test


def test_no_number_is_refused():
    with pytest.raises(UserError, match="train.lr='fast' is not a number"):
        settings("--lr", "fast")


def test_what_may_change_on_a_resumed_run():
    one = settings("--tp", "2", "--mbs", "4", "--output", "a", "--lr", "1e-3").to_dict()
    two = settings("--pp", "2", "--output", "b", "--lr", "1e-3").to_dict()
    assert what_is_learnt(one) == what_is_learnt(two)
    assert what_is_learnt(one) != what_is_learnt(settings("--lr", "2e-3").to_dict())


@pytest.mark.parametrize("stages", range(2, 9))
def test_every_stage_has_layers_and_none_many_more(stages):
    for layers in range(stages, 60):
        first, last = end_stages(layers, stages)
        if layers % stages == 0:
            assert first is last is None
            continue
        # Every way to give the stages between as many layers each.
        ways = [
            (a, n, layers - a - (stages - 2) * n)
            for a in range(1, layers)
            for n in range(1, layers)
            if layers - a - (stages - 2) * n > 0
        ]
        fullest = min(max(way if stages > 2 else way[::2]) for way in ways)
        between = layers - first - last
        assert first > 0 and last > 0 and between % max(1, stages - 2) == 0
        each = [between // (stages - 2)] if stages > 2 else []
        assert max(first, last, *each) == fullest


def test_memory_counts_both_models(site):
    made = settings(
        "--teacher", str(site / "teacher"), "--student", str(site / "student"), "--seq-length", "16",
        "--gbs", "4", "--pp", "2",
    )  # fmt: skip
    first, last = memory(made, 1)
    from models import load_hf

    for role in ("teacher", "student"):
        whole = load_hf(site / role)
        copy = (
            whole.model.embed_tokens.weight.numel()
        )  # the last stage has its own copy of a tied output layer
        held = sum(getattr(stage, role) for stage in (first, last)) * 2**30 / 4
        assert held == whole.num_parameters() + copy
    assert last.logits == 3 * 16 * 128 * 4 / 2**30 and first.logits == 0


@pytest.mark.parametrize(
    ("words", "layer", "stored"), [((), 10 + 24 / 2, 2), (("--sequence-parallel",), 17, 1)]
)
def test_tensor_parallel_ranks_share_all_activations_with_sequence_parallelism_alone(
    site, words, layer, stored
):
    made = ("--teacher", str(site / "teacher"), "--student", str(site / "student"), "--seq-length", "16",
            "--gbs", "4", "--tp", "2", *words)  # fmt: skip
    channels = 16 * 64 * 2  # tokens, hidden size, fp32 for bf16
    layers = 3
    [kept] = memory(settings(*made), 1)
    assert kept.activations * 2**30 == pytest.approx(channels * layers * layer)
    [kept] = memory(settings(*made, "--recompute-activations"), 1)
    assert kept.activations * 2**30 == pytest.approx(channels * (layers * stored + layer))
