"""Every family cut along every hparam it has: counts, tensors, configs, logits, and what Megatron rebuilds."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from masks import masked_dense
from matrix import (
    CASES,
    EXPERT_NAMES,
    TOLERANCE,
    UNSAYABLE,
    cuts,
    full_sizes,
    load,
    load_hf,
    run_through,
)
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from models import cut, difference, run, run_hf, tokens
from references import Kept, sliced_state
from safetensors.torch import load_file
from transformers import PreTrainedModel

import mbridge_prune as mbp
from mbridge_prune.mcore_minitron import table_of

IDS = tokens(seed=11)
CONFIG_NAMES = {
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("intermediate_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "num_moe_experts": EXPERT_NAMES,
    "moe_ffn_hidden_size": ("moe_intermediate_size",),
    "moe_shared_expert_intermediate_size": (
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "mamba_num_heads": ("mamba_num_heads",),
    "mamba_head_dim": ("mamba_head_dim",),
    "num_layers": ("num_hidden_layers",),
}
SAID_BY_WRITER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
EXPERTS = ("TEGroupedMLP", "SequentialMLP")


@dataclasses.dataclass
class Case:
    """A cut and everything that comes of it; `loaded` is the pruned Megatron model with its bridge."""

    family: str
    name: str
    source: Path
    dense: PreTrainedModel
    loaded: Any
    plan: mbp.Plan
    out: Path
    exported: PreTrainedModel
    unfit: dict[str, Any]

    @property
    def megatron(self) -> torch.nn.Module:
        return self.loaded.unwrapped_model

    @property
    def grouped(self) -> bool:
        return self.name != "all_separate"


@pytest.fixture(scope="module")
def dense(hf_folder) -> Callable[[str], PreTrainedModel]:
    """The unpruned transformers model of a family, read once."""
    return cache(lambda family: load_hf(hf_folder(family))[0])


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, hf_folder, dense, tmp_path_factory) -> Case:
    family, name = request.param
    path = hf_folder(family)
    loaded = load(path, grouped=name != "all_separate")
    plan = cut(loaded.unwrapped_model, cuts(family)[name], forward_loop=run_through)
    out = tmp_path_factory.mktemp("out") / "hf"
    mbp.export_hf(loaded.bridge, loaded.model, out, layers_kept=plan.layers_kept, source=path,
                  sizes=plan.sizes_after, trust_remote_code=True)  # fmt: skip
    exported, unfit = load_hf(out)
    return Case(family, name, path, dense(family), loaded, plan, out, exported, unfit)


def test_sizes(case):
    full = full_sizes(case.dense.config)
    assert case.plan.sizes_before == full
    assert set().union(*cuts(case.family).values()) == full.keys() - UNSAYABLE.get(case.family, set())
    wanted = {**full, **cuts(case.family)[case.name]}
    if case.name == "num_query_groups":  # as many heads a group as before
        wanted["num_attention_heads"] = 4
    assert case.plan.sizes_after == wanted == table_of(case.megatron).hparams()
    config = case.megatron.config
    assert {hparam: getattr(config, hparam) for hparam in wanted} == wanted
    assert config.num_query_groups == wanted.get("num_query_groups", wanted["num_attention_heads"])


def test_counts(case):
    """The plan's count, the Megatron model's, the folder's, and transformers' (which has no MTP layers)."""
    state = weights(case.out)
    total = sum(map(torch.Tensor.numel, state.values()))
    ahead = sum(t.numel() for n, t in state.items() if is_ahead(n, case.exported.config))
    assert case.plan.params_after == total == sum(p.numel() for p in case.megatron.parameters())
    assert case.exported.num_parameters() == total - ahead
    assert case.plan.params_before == sum(map(torch.Tensor.numel, weights(case.source).values()))
    for plan_says, folder, config in (
        (case.plan.active_before, case.source, case.dense.config),
        (case.plan.active_after, case.out, case.exported.config),
    ):
        assert plan_says == active(weights(folder), config.get_text_config())


def active(state: dict[str, torch.Tensor], text: Any) -> int:
    """All parameters without those of the routed experts that a token is not sent to."""
    experts = next((getattr(text, name) for name in EXPERT_NAMES if getattr(text, name, None)), 1)
    routed = sum(t.numel() for n, t in state.items() if re.search(r"\.experts\b", n))
    idle = experts - getattr(text, "num_experts_per_tok", experts)
    return sum(map(torch.Tensor.numel, state.values())) - routed // experts * idle


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The folder's parameters; a router's correction is a buffer."""
    state = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in state.items() if not name.endswith("e_score_correction_bias")}


def is_ahead(name: str, config: Any) -> bool:
    """True for a tensor of a multi-token-prediction layer."""
    number = re.match(r"model\.layers\.(\d+)\.", name)
    return number is not None and int(number[1]) >= config.get_text_config().num_hidden_layers


def test_logits(case):
    got = run(case.megatron, IDS)
    assert difference(got, run_hf(case.exported, IDS)) <= TOLERANCE
    assert difference(got, run_hf(case.dense, IDS)) > 1e-2, "the cut changed nothing, so this proves nothing"


def test_logits_of_the_masked_unpruned_model(case):
    """Transformers' dense model, in which what the plan removed is masked, layer by layer.

    No family is left out; vision-language ones read text. Multi-token-prediction layers have no counterpart in
    transformers: the tests of tensors, of sorting and of what Megatron rebuilds are about them.
    """
    masked = masked_dense(case.dense, case.plan)
    assert difference(run(case.megatron, IDS), run_hf(masked, IDS)) <= TOLERANCE


def test_nothing_missing_and_nothing_left_over(case):
    ahead = {n for n in load_file(case.out / "model.safetensors") if is_ahead(n, case.exported.config)}
    assert set(case.unfit.pop("unexpected_keys", ())) <= ahead and not case.unfit
    assert bool(ahead) == (case.family == "glm4_moe_mtp")


def test_tensors_are_the_unpruned_ones_indexed(case):
    want = sliced_state(
        load_file(case.source / "model.safetensors"), case.dense.config.get_text_config(), case.plan
    )
    have = load_file(case.out / "model.safetensors")
    assert want.keys() == have.keys()
    assert [name for name in want if not torch.equal(want[name], have[name])] == []


def test_config(case):
    """Fields that follow a size follow it, those that list layers list those that stay, no other changes."""
    before, text = case.dense.config.get_text_config(), case.exported.config.get_text_config()
    sizes = case.plan.sizes_after
    want = before.to_dict()
    for hparam, names in CONFIG_NAMES.items():
        want |= {name: sizes[hparam] for name in names if hparam in sizes and want.get(name)}
    if "num_query_groups" not in sizes:
        want["num_key_value_heads"] = sizes["num_attention_heads"]
    experts_only = "moe_ffn_hidden_size" in sizes and "ffn_hidden_size" not in sizes
    if experts_only and "moe_intermediate_size" not in want:
        want["intermediate_size"] = sizes["moe_ffn_hidden_size"]
    if want.get("n_shared_experts") and not want.get("moe_shared_expert_intermediate_size"):
        want["n_shared_experts"] = (
            sizes["moe_shared_expert_intermediate_size"] // sizes["moe_ffn_hidden_size"]
        )
    if len(case.plan.layers_kept) < before.num_hidden_layers:
        want |= layer_fields(before, case.plan.layers_kept)
    have = text.to_dict()
    channels = have.pop("head_dim", None)
    if not getattr(text, "kv_lora_rank", None):
        implied = text.hidden_size // text.num_attention_heads
        assert (channels or implied) == Kept(before, case.plan, "").head_dims[3]
    want.pop("head_dim", None)
    assert {k: v for k, v in have.items() if want.get(k) != v and k not in SAID_BY_WRITER} == {}
    assert want.keys() - have.keys() <= SAID_BY_WRITER
    whole, now = (c.to_dict() for c in (case.dense.config, case.exported.config))
    outside = whole.keys() - before.to_dict().keys() - {"text_config"}
    assert {k: now[k] for k in outside} == {k: whole[k] for k in outside}


def layer_fields(text: Any, kept: list[int]) -> dict[str, Any]:
    """What a config says layer by layer, for the layers that stay."""
    fields: dict[str, Any] = {}
    if getattr(text, "layer_types", None):
        fields["layer_types"] = [text.layer_types[i] for i in kept]
    for name in ("first_k_dense_replace", "max_window_layers"):
        if getattr(text, name, None) is not None:
            fields[name] = len([i for i in kept if i < getattr(text, name)])
    if getattr(text, "mlp_only_layers", None):
        fields["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in text.mlp_only_layers]
    if getattr(text, "hybrid_override_pattern", None):
        fields["hybrid_override_pattern"] = "".join(text.hybrid_override_pattern[i] for i in kept)
    return fields


def test_megatron_builds_the_same_model_from_the_export(case):
    """Every parameter, buffer, config field and plain attribute, not only what the forward reads."""
    fresh = load(case.out, grouped=case.grouped).unwrapped_model
    assert difference(run(fresh, IDS), run(case.megatron, IDS)) <= TOLERANCE
    state, built = (tensors(m) for m in (case.megatron, fresh))
    assert state.keys() == built.keys()
    assert [name for name in state if not torch.equal(state[name], built[name])] == []
    assert config_fields(case.megatron) == config_fields(fresh)
    assert attributes(case.megatron) == attributes(fresh)


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers but those that count tokens."""
    return {
        n: t for n, t in model.state_dict().items() if torch.is_tensor(t) and "tokens_per_expert" not in n
    }


def config_fields(model: torch.nn.Module) -> dict[str, Any]:
    fields = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config)}
    if "moe_ffn_hidden_size" in fields and all_experts(model):
        del fields["ffn_hidden_size"]  # no layer has it
    for name in ("hf_model_id", "hf_text_config"):  # where it came from
        fields.pop(name, None)
    return {name: value for name, value in fields.items() if is_plain(value)}


def all_experts(model: torch.nn.Module) -> bool:
    return "ffn_hidden_size" not in table_of(model).hparams()


def attributes(model: torch.nn.Module) -> dict[str, Any]:
    """Module and attribute name -> value, of plain values."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if is_plain(value) and name != "is_first_microbatch"
    }


def is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (int, float, str))


@pytest.mark.parametrize("case", [c for c in CASES if c[1].startswith("all")], ids="-".join, indirect=True)
def test_it_trains(case):
    """The next thing that happens to a pruned model, in the same process."""
    get_moe_layer_wise_logging_tracker().clear()  # of this process, as long as the first model's layers
    model = case.megatron.train().requires_grad_()  # Bridge freezes one family's language model
    positions_bs = torch.arange(IDS.shape[1]).expand_as(IDS)
    out = model(input_ids=IDS, position_ids=positions_bs, attention_mask=None, labels=IDS)
    loss = (out[0] if isinstance(out, tuple) else out).mean()
    loss.backward()
    assert torch.isfinite(loss)
    still = [n for n, p in model.named_parameters() if p.grad is None or p.grad.shape != p.shape]
    assert [n for n in still if ".experts." not in n and not is_vision(n)] == []
    for name, module in model.named_modules():
        if type(module).__name__ in EXPERTS:  # of those that got tokens
            assert any(p.grad is not None and p.grad.any() for p in module.parameters()), name


def test_experts_are_grouped_or_separate_as_asked(case):
    kinds = {type(m).__name__ for m in case.megatron.modules()} & set(EXPERTS)
    assert kinds <= {EXPERTS[0] if case.grouped else EXPERTS[1]}
    assert bool(kinds) == ("num_moe_experts" in case.plan.sizes_after)


def is_vision(name: str) -> bool:
    return "vision" in name or "visual" in name or "projector" in name
