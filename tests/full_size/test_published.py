"""The table is what transformers counts, and close to what the makers published."""

from __future__ import annotations

import pytest
import torch
from nemotron_h import NemotronHConfig, NemotronHForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from full_size import NAMES, full_size_config
from full_size.published import PUBLISHED

SLOW = ("deepseek-v3",)  # 44,544 modules of experts


def on_meta(name: str) -> PreTrainedModel:
    fields = full_size_config(name)
    with torch.device("meta"):
        if fields["model_type"] == "nemotron_h":
            return NemotronHForCausalLM(NemotronHConfig(**fields))
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


def test_every_config_is_in_the_table():
    assert sorted(PUBLISHED) == NAMES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in NAMES]
)
def test_exact_counts_are_those_of_transformers(name):
    model, said, config = on_meta(name), PUBLISHED[name], full_size_config(name)
    assert model.num_parameters() == said.exact
    experts = [config[k] for k in ("num_experts", "n_routed_experts", "num_local_experts") if k in config]
    if experts:
        routed = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
        idle = routed * (experts[0] - config["num_experts_per_tok"]) // experts[0]
        assert said.exact - idle == said.exact_active
    else:
        assert said.active is said.exact_active is None


@pytest.mark.parametrize("name", NAMES)
def test_the_makers_say_about_the_same(name):
    said, config = PUBLISHED[name], full_size_config(name)
    assert abs(said.exact / 1e9 - float(said.total)) <= _half_a_digit(said.total)
    if said.active is not None:
        embedding = config["vocab_size"] * config["hidden_size"] if said.without_embedding else 0
        active = (said.exact_active - embedding) / 1e9
        assert abs(active - float(said.active)) <= _half_a_digit(said.active) + said.slack


def _half_a_digit(number: str) -> float:
    return 0.5 * 10.0 ** -len(number.partition(".")[2])
