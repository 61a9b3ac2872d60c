"""The dry run of full-size models, from config.json alone: published sizes, and every recipe's target."""

from __future__ import annotations

from pathlib import Path

import pytest

from full_size import NAMES, write_full_size
from full_size.published import PUBLISHED
from mbridge_prune.config import RECIPES, Settings, read_yaml
from mbridge_prune.dry_run import Forecast, forecast

SLOW = ("deepseek-v3",)  # transformers builds 44,544 expert modules
TARGETS = {  # recipe: parameters after, counted with transformers' own classes
    "llama-3.1-8b-to-4.5b-width": 4_512_746_496,
    "llama-3.1-8b-to-4.5b-depth": 4_540_469_248,
    "qwen3-8b-to-6b-width": 5_977_809_408,
    "qwen3-8b-to-6b-depth": 5_875_378_176,
    "nemotron-h-8b-to-4b": 4_489_223_040,
    "nemotron-nano-9b-v2-to-7b": 7_005_213_040,
    "nemotron-3-nano-30b-a3b-to-20b": 20_354_655_680,
    "qwen3-30b-a3b-to-20b": 19_657_340_928,
    "gpt-oss-20b-to-16b": 16_134_970_752,
    "gemma-3-1b-to-0.8b": 786_552_832,
    "deepseek-v3-to-508b": 507_522_604_032,
}
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in TARGETS]


def recipe(name: str) -> Settings:
    settings = Settings()
    read_yaml(settings, RECIPES / f"{name}.yaml")
    return settings


def forecast_of(name: str, folder: Path) -> Forecast:
    settings = recipe(name)
    write_full_size(model_of(name), folder / "in")
    layout = {
        "pipeline_model_parallel_size": settings.parallel.pp,
        "expert_model_parallel_size": settings.parallel.ep,
        "num_layers_in_first_pipeline_stage": settings.parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": settings.parallel.num_layers_in_last_pipeline_stage,
    }
    return forecast(
        folder / "in",
        settings.prune.export_config,
        provider_overrides=layout,
        divisors=settings.prune.divisors(),
        trust_remote_code=settings.model.trust_remote_code,
    )


def model_of(name: str) -> str:
    return name.rpartition("-to-")[0]


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*TARGETS, "smollm2-135m"}
    assert {model_of(name) for name in TARGETS} <= set(NAMES)


@pytest.mark.parametrize("name", ALL)
def test_sizes_before_are_published_and_sizes_after_are_valid(name, tmp_path):
    said, published = forecast_of(name, tmp_path).plan, PUBLISHED[model_of(name)]
    assert said.params_before == published.exact
    assert said.active_before == (published.exact_active or published.exact)
    assert said.params_after == TARGETS[name]
    for hparam, size in recipe(name).prune.export_config.items():
        assert said.sizes_after[hparam] == size < said.sizes_before[hparam]


def test_a_rank_holds_its_share_of_the_experts(tmp_path):
    """Qwen3-30B-A3B on two stages and four expert-parallel ranks."""
    write_full_size("qwen3-30b-a3b", tmp_path)
    whole, shared = (
        forecast(
            tmp_path,
            {},
            provider_overrides={"pipeline_model_parallel_size": 2, "expert_model_parallel_size": ep},
        )
        for ep in (1, 4)
    )
    experts = 24 * 128 * 3 * 768 * 2048
    assert [a.params - b.params for a, b in zip(whole.stages, shared.stages, strict=True)] == [
        experts * 3 // 4
    ] * 2
    assert 16 in whole.choices["num_moe_experts"] and 0 not in whole.choices["num_moe_experts"]
