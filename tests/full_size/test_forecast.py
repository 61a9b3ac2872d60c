"""The dry run of full-size models, from config.json alone: published sizes, and every recipe's target."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from commands import launched
from models import hf_config

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
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30,
}  # fmt: skip
AUTO = {  # recipe: its budget, the choices of the search
    "smollm2-135m-to-75-percent": (
        0.75 * 134_515_008,
        {"hidden_size": range(384, 577, 64), "ffn_hidden_size": range(1024, 1537, 128),
         "num_attention_heads": (6, 9), "num_layers": range(24, 31, 2)},
    ),
    "qwen3-8b-to-6b-auto": (
        6e9,
        {"hidden_size": range(2560, 4097, 256), "ffn_hidden_size": range(7680, 12289, 512),
         "num_attention_heads": (24, 32), "num_layers": range(30, 37, 2)},
    ),
}  # fmt: skip
ALL = [pytest.param(name, marks=[pytest.mark.slow] if name.startswith(SLOW) else []) for name in TARGETS]


def recipe(name: str) -> Settings:
    settings = Settings()
    read_yaml(settings, RECIPES / f"{name}.yaml")
    return settings


def forecast_of(name: str, folder: Path) -> Forecast:
    settings = recipe(name)
    if model_of(name) in NAMES:
        write_full_size(model_of(name), folder / "in")
    else:
        hf_config("llama_tied", **SMOLLM2).save_pretrained(folder / "in")
    budgets = settings.search.budgets()
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
        divisors=settings.prune.divisors(usual=bool(budgets)),
        trust_remote_code=settings.model.trust_remote_code,
        search=(budgets, launched("prune").search_config(settings)) if budgets else None,
    )


def model_of(name: str) -> str:
    return name.rpartition("-to-")[0]


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*TARGETS, *AUTO, "smollm2-135m"}
    assert {model_of(name) for name in TARGETS} <= set(NAMES)


@pytest.mark.parametrize("name", ALL)
def test_sizes_before_are_published_and_sizes_after_are_valid(name, tmp_path):
    said, published = forecast_of(name, tmp_path).plan, PUBLISHED[model_of(name)]
    assert said.params_before == published.exact
    assert said.active_before == (published.exact_active or published.exact)
    assert said.params_after == TARGETS[name]
    for hparam, size in recipe(name).prune.export_config.items():
        assert said.sizes_after[hparam] == size < said.sizes_before[hparam]


def parameters(name: str, hidden: int, ffn: int, heads: int, layers: int) -> int:
    """Of Llama (tied) or Qwen3 (untied, norms of queries and keys), by hand."""
    vocabulary, groups, head, tied = (151936, 8, 128, False) if "qwen3" in name else (49152, 3, 64, True)
    attention = 2 * hidden * heads * head + 2 * hidden * groups * head + (0 if tied else 2 * head)
    layer = attention + 3 * hidden * ffn + 2 * hidden
    return vocabulary * hidden * (1 if tied else 2) + layers * layer + hidden


@pytest.mark.parametrize("name", AUTO)
def test_a_search_finds_candidates_inside_its_budget(name, tmp_path):
    bound, choices = AUTO[name]
    assert recipe(name).prune.export_config == {}
    assert list(recipe(name).search.budgets()) == ["params"]
    grid = [parameters(name, *sizes) for sizes in itertools.product(*choices.values())]
    inside = sum(count <= bound for count in grid)
    assert 10 < inside < len(grid)
    said = forecast_of(name, tmp_path)
    assert said.plan.params_before == max(grid)
    assert said.in_budget == f"{len(grid)} real candidates, {inside} of them keep the budget"


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
