"""Settings: three spellings of one key, one order of precedence, and values checked at the door."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from mbridge_prune import config
from mbridge_prune.config import Settings, from_command_line, parser, read_yaml, set_key
from mbridge_prune.errors import UserError
from mbridge_prune.prune_config import DIVISORS


def settings(*words: str) -> Settings:
    return from_command_line(words)[0]


def keys() -> list[str]:
    return [
        f"{s.name}.{f.name}"
        for s in dataclasses.fields(Settings)
        for f in dataclasses.fields(s.default_factory)
    ]


def test_every_key_has_a_flag_and_no_flag_is_shared():
    actions = {a.dest: a.option_strings for a in parser()._actions}
    assert set(keys()) <= set(actions)
    flags = [flag for strings in actions.values() for flag in strings]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("key", keys())
def test_flag_yaml_and_dot_override_mean_the_same(key, tmp_path):
    section, name = key.split(".")
    option = {f.name: f for f in dataclasses.fields(getattr(Settings(), section))}[name]
    kind = str(option.type)
    text = next(iter(option.metadata["choices"][-1:]), None)
    if text is None:
        text = {"b": "true", "i": "3", "d": '{"hidden_size": 8}', "s": "some/where", "f": "0.25", "l": "a,b"}[
            kind[0]
        ]
    flag = option.metadata["flags"][0]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({section: {name: yaml.safe_load(text)}}))
    want = yaml.safe_load(text).split(",") if kind.startswith("list") else yaml.safe_load(text)
    for words in (
        [f"{key}={text}"],
        [flag, text],
        [f"{flag}={text}"],
        ["--config", str(tmp_path / "a.yaml")],
    ):
        part = getattr(settings(*words), section)
        assert getattr(part, name) == want, words


def test_later_wins(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(
        "parallel: {pp: 4}\ncalibration: {num_samples: 7}\nprune: {export_config: {hidden_size: 8, num_layers: 2}}"
    )
    recipe = ["--recipe", "smollm2-135m"]
    assert settings(*recipe).parallel.pp == 2
    assert settings(*recipe).calibration.num_samples == 56
    assert settings(*recipe, "--config", str(file)).parallel.pp == 4
    assert settings(*recipe, "--config", str(file)).calibration.seq_length == 512
    assert settings(*recipe, "--config", str(file)).prune.export_config == {
        "ffn_hidden_size": 1152,
        "hidden_size": 8,
        "num_layers": 2,
    }
    assert settings("--pp", "5", "--config", str(file), *recipe).parallel.pp == 5
    assert settings("--pp", "5", "parallel.pp=6").parallel.pp == 6
    both = settings("--config", str(file), "prune.export_config.num_layers=3").prune.export_config
    assert both == {"hidden_size": 8, "num_layers": 3}


def test_defaults_are_not_shared_between_settings():
    one, two = Settings(), Settings()
    set_key(one, "prune.export_config.hidden_size", 8, "test")
    assert two.prune.export_config == {}


def test_folders():
    assert str(settings("-o", "run").hf_folder()) == "run/hf"
    assert str(settings("-o", "run").scores_file()) == "run/scores.safetensors"
    assert str(settings("--output-hf-path", "out/").run_folder()) == "out.run"
    assert str(settings("--output-hf-path", "out").hf_folder()) == "out"
    assert str(settings("-o", "run", "--scores", "s").scores_file()) == "s"
    with pytest.raises(UserError, match="no output folder"):
        settings().run_folder()


def test_text_stays_text():
    for word in ("2026_01", "12:30", "0017", "1.10", "true", "a: b", "#1"):
        assert settings("--output", word).output.path == word
        assert settings(f"output.path={word}").output.path == word
    assert settings("output.path=null").output.path is None


def test_divisors_are_those_of_the_mode():
    assert settings().prune.divisors() == {f"{name}_divisor": 1 for name in DIVISORS}
    usual = settings("--hidden-size-divisor", "64").prune.divisors(usual=True)
    assert usual == {
        **{f"{name}_divisor": step for name, step in DIVISORS.items()},
        "hidden_size_divisor": 64,
    }


def test_ranges_of_a_search_are_mappings():
    want = {"hidden_size": {"min": 8, "max": 16}, "num_layers": {"min": 2}}
    assert (
        settings(
            "--search-space", '{"hidden_size": {"min": 8, "max": 16}, "num_layers": {"min": 2}}'
        ).search.space
        == want
    )
    dotted = settings(
        "search.space.hidden_size.min=8", "search.space.hidden_size.max=16", "search.space.num_layers.min=2"
    )
    assert dotted.search.space == want


def test_a_seed_may_be_zero():
    assert settings("--seed", "0").calibration.seed == 0
    with pytest.raises(UserError, match="seed"):
        settings("--seed=-1")


def test_a_refused_value_names_where_it_came_from(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("parallel: {pp: two}")
    with pytest.raises(UserError, match=r"bad.yaml: parallel.pp='two' is not an integer"):
        read_yaml(Settings(), file)
    with pytest.raises(UserError, match=r"--pp_size|--pp: parallel.pp='two'"):
        settings("--pp_size", "two")


def test_every_recipe_is_readable():
    recipes = sorted(config.RECIPES.glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        made = settings("--recipe", recipe.stem)
        assert bool(made.prune.export_config) != bool(made.search.budgets())


def test_a_recipe_can_be_a_search():
    made = settings("--recipe", "smollm2-135m-to-75-percent")
    assert made.search.budgets() == {"params": "75%"}
    assert (made.search.score_func, made.search.top_k, made.search.num_samples) == ("kl", 5, 8)
    assert (made.calibration.num_samples, made.calibration.seq_length) == (16, 512)
    steps = made.prune.divisors(usual=True)
    assert (steps["hidden_size_divisor"], steps["ffn_hidden_size_divisor"]) == (64, 128)


def test_a_yaml_lies_over_the_recipe_hparam_by_hparam(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("prune: {export_config: {ffn_hidden_size: 9728}}")
    settings, _ = config.from_command_line(["--recipe", "qwen3-8b-to-6b-width", "--config", str(file)])
    assert settings.prune.export_config == {"hidden_size": 3584, "ffn_hidden_size": 9728}


def test_a_bare_switch_leaves_the_override_after_it_alone():
    settings, _ = config.from_command_line(["--trust-remote-code", "prune.export_config.hidden_size=8"])
    assert settings.model.trust_remote_code and settings.prune.export_config == {"hidden_size": 8}


def test_a_megatron_path_alone_names_the_run_folder():
    settings, _ = config.from_command_line(["--output_megatron_path", "m"])
    assert str(settings.run_folder()) == "m.run"
