"""Six-layer models with named weak layers, and the results of the same jobs at every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mixtures
import numpy as np
import pytest
import shards
import torch
from jobs import KINDS
from launching import torchrun
from models import auto_class, tokens, write_hf
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig

WIDTH = {"hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4}
EVERYTHING = {**WIDTH, "num_layers": 4}
MODELS = {  # name: (family, weak layers)
    "untied": ("llama", (2, 3)),
    "tied": ("llama_tied", (2, 3)),
    "weak_first": ("llama_tied", (0, 1)),
    "weak_last": ("llama", (4, 5)),
}
FIRST2 = {"num_layers_in_first_pipeline_stage": 2}
LAST1 = {"num_layers_in_last_pipeline_stage": 1}
# layout: (ranks, pipeline stages, {job: (model, sizes, overrides)})
COMMON = {"untied": ("untied", EVERYTHING, {}), "tied": ("tied", EVERYTHING, {})}
LAYOUTS: dict[str, tuple[int, int, dict[str, tuple[str, dict, dict]]]] = {
    "single": (1, 1, {**COMMON, "five": ("untied", {"num_layers": 5}, {}), "weak_first": ("weak_first", EVERYTHING, {}),
                      "weak_last": ("weak_last", EVERYTHING, {})}),
    "pp2": (2, 2, {**COMMON, "five": ("untied", {"num_layers": 5}, {})}),
    "pp2_first2": (2, 2, {**{k: (m, s, FIRST2) for k, (m, s, _) in COMMON.items()},
                          "weak_first": ("weak_first", EVERYTHING, FIRST2)}),
    "pp2_last1": (2, 2, {"tied": ("tied", EVERYTHING, LAST1)}),
    "dp2": (2, 1, COMMON),
    "pp3": (3, 3, {**COMMON, "weak_first": ("weak_first", EVERYTHING, {}), "weak_last": ("weak_last", EVERYTHING, {})}),
}  # fmt: skip
TOGETHER = {"pp2": ("pp2", "pp2_first2", "pp2_last1", "dp2")}
"""Layouts of as many ranks share one start."""


@dataclass
class Result:
    folder: Path

    @property
    def plan(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())["plan"]

    @property
    def stages(self) -> list[int]:
        """Layers on every pipeline stage after the cut."""
        return json.loads((self.folder / "result.json").read_text())["stages"]

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "scores.safetensors")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "hf" / "model.safetensors")

    @property
    def meta(self) -> dict[str, Any]:
        with safe_open(self.folder / "scores.safetensors", "pt") as file:
            return json.loads(file.metadata()["meta"])

    def order(self, key: str, plan: dict[str, Any]) -> list[list[int]]:
        """Of an axis: most important first, in each of the groups that the plan has for it."""
        scores = self.scores[key].view(len(plan["kept"].get(key, [0])), -1)
        return scores.argsort(dim=1, descending=True, stable=True).tolist()

    def exported(self) -> torch.nn.Module:
        """The Hugging Face model; its code may come with it."""
        path, trust = self.folder / "hf", {"trust_remote_code": True}
        config = AutoConfig.from_pretrained(path, **trust)
        exact = {"attn_implementation": "eager"} if config.model_type == "gemma2" else {}
        return auto_class(config).from_pretrained(path, dtype=torch.float32, **trust, **exact).eval()

    def logits(self, dp: int = 0, name: str = "logits") -> torch.Tensor:
        return torch.load(self.folder / f"{name}-{dp}.pt")


def do(jobs: list[dict[str, Any]], ranks: int, file: Path) -> None:
    """Does the jobs in this process or, under torchrun, in so many others."""
    if ranks == 1:
        for one in jobs:
            KINDS[one.get("kind", "work")](one)
        return
    file.write_text(json.dumps(jobs))
    done = torchrun(ranks, Path(__file__).with_name("jobs.py"), file)
    assert done.returncode == 0, done.stdout + done.stderr


def write_texts(root: Path) -> None:
    np.save(root / "tokens.npy", tokens(8).numpy())
    torch.save(tokens(4, seed=11), root / "prompts.pt")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, the calibration tokens and the prompts."""
    root = tmp_path_factory.mktemp("distributed")
    write_texts(root)
    for name, (family, weak) in MODELS.items():
        model = write_hf(family, root / "models" / name, num_hidden_layers=6)
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                # The general weak layer of models.py gets its strength back; ours lose it.
                factor = 20.0 if number == 1 else 1.0
                factor *= 0.01 * (number + 1) if number in weak else 1.0
                layer.self_attn.o_proj.weight.mul_(factor)
                layer.mlp.down_proj.weight.mul_(factor)
        model.save_pretrained(root / "models" / name)
    return root


@pytest.fixture(scope="session")
def job(site: Path) -> Callable[..., dict[str, Any]]:
    def make(
        layout: str,
        name: str,
        model: str,
        sizes: dict[str, int],
        overrides: dict[str, int],
        pp: int,
        **more: Any,
    ) -> dict[str, Any]:
        out = site / layout / name
        return {
            "model": str(site / "models" / model), "pp": pp, "overrides": overrides, "sizes": sizes, "score": True,
            "tokens": str(site / "tokens.npy"), "prompts": str(site / "prompts.pt"), "out": str(out),
            "scores": str(out / "scores.safetensors"), "megatron": layout == "pp2", **more,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def result(site: Path, job: Callable[..., dict[str, Any]]) -> Callable[[str, str], Result]:
    """`result(layout, job)`; a layout is started when the first test asks for it, once."""
    started: set[str] = set()

    def get(layout: str, name: str) -> Result:
        start = next((key for key, layouts in TOGETHER.items() if layout in layouts), layout)
        if start not in started:
            started.add(start)
            ranks = LAYOUTS[start][0]
            jobs = [
                job(each, name, *what, LAYOUTS[each][1])
                for each in TOGETHER.get(start, (start,))
                for name, what in LAYOUTS[each][2].items()
            ]
            do(jobs, ranks, site / f"{start}.json")
        return Result(site / layout / name)

    return get


@pytest.fixture(scope="session")
def mixed_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `site`, of the models of mixtures.py and shards.py."""
    root = tmp_path_factory.mktemp("mixtures")
    write_texts(root)
    for name in mixtures.MODELS:
        mixtures.write(name, root / "models" / name)
    shards.write(root / "models")
    return root


@pytest.fixture(scope="session")
def mixed(mixed_site: Path) -> Callable[[str, str], Result]:
    """As `result`, of the jobs of mixtures.py and shards.py: those of as many ranks share one start."""
    started: set[tuple[str, int, bool]] = set()

    def start(source: ModuleType, ranks: int, slow: bool = False) -> None:
        what = (source.__name__, ranks, slow)
        if what not in started:
            started.add(what)
            file = mixed_site / f"{source.__name__}-{ranks}{'-slow' * slow}.json"
            do(source.jobs(mixed_site, ranks, slow), ranks, file)

    def get(layout: str, name: str) -> Result:
        source = shards if layout in (*shards.LAYOUTS, "refused") else mixtures
        start(mixtures, 1)  # what one rank leaves is read by more
        start(shards, 1)
        if layout != "single":
            of = source.LAYOUTS.get(layout)
            start(source, of.ranks if of else 2, of.slow if of else False)
        return Result(mixed_site / layout / name)

    return get
