"""Experts that are modules of their own (`moe_grouped_gemm=False`), in the import and in the export."""

from __future__ import annotations

import copy
import re
from typing import Any

from megatron.bridge.models.conversion import model_bridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import GatedMLPMapping, MegatronParamMapping
from megatron.core import parallel_state


class SeparateExperts:
    """A bridge that maps them as well as grouped ones."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        registry = super().mapping_registry()  # type: ignore[misc]
        known = {mapping.megatron_param for mapping in registry}
        more = []
        for mapping in registry:
            grouped = mapping.megatron_param
            name = grouped.replace(".experts.linear_fc", ".experts.local_experts.*.linear_fc")
            if name != grouped and name.endswith("weight*") and name[:-1] not in known:
                more.append(renamed(mapping, name[:-1]))
        return MegatronMappingRegistry(*registry, *more)


def renamed(mapping: Any, megatron_param: str) -> Any:
    """The same mapping for another Megatron parameter."""
    if isinstance(mapping, GatedMLPMapping):
        return GatedMLPMapping(megatron_param, gate=mapping.hf_param["gate"], up=mapping.hf_param["up"])
    return type(mapping)(megatron_param, mapping.hf_param)


_gather_from_ep_ranks = MegatronParamMapping.gather_from_ep_ranks


def gather_from_ep_ranks(self: Any, weights: Any, module: Any, name: Any) -> dict[str, Any]:
    """Megatron-Bridge looks for the expert's number behind ".weight", where only grouped ones have it."""
    number = re.search(r"\.local_experts\.(\d+)\.", self.megatron_param)
    if number is None:
        return _gather_from_ep_ranks(self, weights, module, name)
    spelled = copy.copy(self)
    kind = self.megatron_param.rpartition(".")[2]
    spelled.megatron_param = f"expert.{kind}{number[1]}"
    return _gather_from_ep_ranks(spelled, weights, module, name)


MegatronParamMapping.gather_from_ep_ranks = gather_from_ep_ranks

_local_name_to_global = model_bridge._megatron_local_name_to_global


def local_name_to_global(models: Any, config: Any, name: str, vp_stage: Any = None) -> str:
    """Megatron-Bridge renumbers grouped experts of expert-parallel ranks alone."""
    name = _local_name_to_global(models, config, name, vp_stage)
    group = parallel_state.get_expert_model_parallel_group()
    if group.size() == 1 or ".local_experts." not in name:
        return name
    first = config.num_moe_experts // group.size() * group.rank()
    return re.sub(r"\.local_experts\.(\d+)\.", lambda m: f".local_experts.{int(m[1]) + first}.", name)


model_bridge._megatron_local_name_to_global = local_name_to_global
