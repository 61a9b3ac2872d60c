"""Where a model comes from: Hugging Face, or a Megatron checkpoint and the config that describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbridge_prune.bridge.checkpoint import check_shards, hf_config_of, iteration_folder
from mbridge_prune.bridge.load import LoadedModel, check_hf_folder, load_mbridge_model_from_hf
from mbridge_prune.errors import UserError


@dataclass(frozen=True)
class Source:
    """A model to start from.

    Args:
        hf_path: Hugging Face folder or hub name: config and tokenizer, and the weights where there is no
            `iteration`.
        iteration: the folder of the Megatron checkpoint's iteration.
    """

    hf_path: str
    iteration: Path | None = None

    @classmethod
    def of(cls, hf_path: str | None = None, megatron_path: str | None = None) -> Source:
        """Of what the user gave: either, or both where the config does not lie beside the checkpoint.

        Raises:
            UserError: neither was given, or what was given is no checkpoint.
        """
        if not megatron_path:
            if not hf_path:
                raise UserError("no model: give --hf-path FOLDER (or model.hf_path in the config)")
            return cls(hf_path)
        return cls(hf_config_of(megatron_path, hf_path), iteration_folder(megatron_path))

    @property
    def name(self) -> str:
        """What the weights are read from."""
        return str(self.iteration or self.hf_path)

    @property
    def flags(self) -> list[str]:
        """The arguments that name it on a command line."""
        megatron = ["--megatron-path", str(self.iteration)] if self.iteration else []
        return [*megatron, "--hf-path", self.hf_path]

    def check(self) -> None:
        """Refuses missing and broken files, before anything is built from them."""
        check_hf_folder(self.hf_path, weights=self.iteration is None)
        if self.iteration:
            check_shards(self.iteration)

    def load(self, provider_overrides: Mapping[str, Any], trust_remote_code: bool = False) -> LoadedModel:
        """The model of this rank; both ways give the same one, bit for bit."""
        if self.iteration is None:
            return load_mbridge_model_from_hf(
                hf_model_name_or_path=self.hf_path,
                provider_overrides=provider_overrides,
                trust_remote_code=trust_remote_code,
            )
        from mbridge_prune.bridge.megatron import load_mbridge_model_from_megatron

        return load_mbridge_model_from_megatron(
            megatron_path=self.iteration,
            hf_model_name_or_path=self.hf_path,
            provider_overrides=provider_overrides,
            trust_remote_code=trust_remote_code,
        )
