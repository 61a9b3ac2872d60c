"""Opens the models of an evaluation, through Megatron-Bridge or through transformers."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from mbridge_prune import runtime
from mbridge_prune.bridge.export import auto_class
from mbridge_prune.bridge.load import (
    check_hf_folder,
    check_layout,
    load_mbridge_model_from_hf,
    one_rank_first,
    open_bridge,
)
from mbridge_prune.errors import UserError

log = logging.getLogger("mbridge_prune")


class Models(Protocol):
    """`check` refuses what can be refused without weights; `load` gives a model to score."""

    name: str

    def check(self, paths: Sequence[str]) -> int: ...

    def load(self, path: str) -> nn.Module: ...


@dataclass
class Megatron:
    """Models through Megatron-Bridge, each laid out over the same ranks.

    Args:
        pp, ep, tp: pipeline stages, expert and tensor parallel ranks. Layers need not divide over the
            stages: the first takes what is left over.
        dtype: of weights and forward.
        seq_length: of the text.
    """

    pp: int = 1
    ep: int = 1
    tp: int = 1
    dtype: torch.dtype = torch.float32
    seq_length: int = 512
    trust_remote_code: bool = False
    name: str = "megatron"
    stages: dict[str, dict[str, int]] = field(default_factory=dict)

    def check(self, paths: Sequence[str]) -> int:
        """Refuses models and layouts by their configs alone; returns the size of their vocabulary."""
        vocabularies = {}
        for path in paths:
            check_hf_folder(path)
            provider = self._open(path, pp=1)
            vocabularies[path] = provider.vocab_size
            if provider.vocab_size % self.tp:
                raise UserError(
                    f"the {provider.vocab_size:,} tokens of {path} do not divide over --tp {self.tp}"
                )
            over = provider.num_layers % self.pp
            if provider.num_layers < self.pp:
                raise UserError(f"{path} has {provider.num_layers} layers: too few for --pp {self.pp}")
            if over:
                first = provider.num_layers // self.pp + over
                self.stages[path] = {"num_layers_in_first_pipeline_stage": first}
            check_layout(self._open(path, pp=self.pp, **self.stages.get(path, {})))
        runtime.start_model_parallel(self.pp, self.tp, self.ep)
        return one_vocabulary(vocabularies)

    def load(self, path: str) -> nn.Module:
        """The unwrapped model of this rank."""
        with contextlib.redirect_stdout(sys.stderr):  # Bridge's progress is no result
            return load_mbridge_model_from_hf(
                hf_model_name_or_path=path,
                provider_overrides=self._overrides(pp=self.pp, **self.stages.get(path, {})),
                trust_remote_code=self.trust_remote_code,
            ).unwrapped_model

    def _open(self, path: str, **stages: int) -> Any:
        overrides = self._overrides(**stages)
        return open_bridge(path, overrides, trust_remote_code=self.trust_remote_code, weights=False)[1]

    def _overrides(self, pp: int, **stages: int) -> dict[str, Any]:
        return {
            "pipeline_model_parallel_size": pp, "expert_model_parallel_size": self.ep,
            "tensor_model_parallel_size": self.tp, "params_dtype": self.dtype, "pipeline_dtype": self.dtype,
            "seq_length": self.seq_length, **stages,
        }  # fmt: skip


@dataclass
class Transformers:
    """Models through transformers, whole on this process's device."""

    dtype: torch.dtype = torch.float32
    trust_remote_code: bool = False
    name: str = "transformers"

    def check(self, paths: Sequence[str]) -> int:
        """As `Megatron.check`."""
        if runtime.world_size() > 1:
            raise UserError("--backend transformers runs on one process: start it without torchrun")
        vocabularies = {}
        for path in paths:
            check_hf_folder(path)
            config = hf_config(path, self.trust_remote_code)
            vocabularies[path] = getattr(config, "text_config", config).vocab_size
        return one_vocabulary(vocabularies)

    def load(self, path: str) -> nn.Module:
        """The model in evaluation mode."""
        config = hf_config(path, self.trust_remote_code)
        model = auto_class(config).from_pretrained(
            path, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )
        return model.to(runtime.device()).eval()


def known_to_bridge(paths: Sequence[str], trust_remote_code: bool = False) -> bool:
    """True where Megatron-Bridge knows the architecture of every model."""
    from megatron.bridge import AutoBridge

    for path in paths:
        check_hf_folder(path)
        if not AutoBridge.supports(hf_config(path, trust_remote_code)):
            log.info("Megatron-Bridge does not know the architecture of %s: through transformers", path)
            return False
    return True


def hf_config(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        with one_rank_first(trust_remote_code):
            return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the model config of {path}: {first}") from error


def one_vocabulary(vocabularies: dict[str, int]) -> int:
    """The size that all have."""
    if len(set(vocabularies.values())) > 1:
        sizes = ", ".join(f"{path} has {size:,} tokens" for path, size in vocabularies.items())
        raise UserError(f"kl compares predictions over one vocabulary, but {sizes}")
    return next(iter(vocabularies.values()))
