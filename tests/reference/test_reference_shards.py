"""The reference kernels on two tensor- or expert-parallel ranks against transformers and plain PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mbridge_prune  # noqa: F401  isort: skip
import pytest
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from models import difference, load_hf, run_hf, tokens, write_hf

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "distributed"))
from launching import torchrun  # noqa: E402
from sharded import LAYOUTS, rows  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Transformer Engine stands here itself")
MODELS = {"llama": ("llama", {}), "one_group": ("llama", {"num_key_value_heads": 1}),
          "moe": ("qwen3_moe", {"norm_topk_prob": True})}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("layouts")
    for name, (family, changes) in MODELS.items():
        write_hf(family, root / name, num_hidden_layers=2, **changes)
    torch.save(tokens(3), root / "prompts.pt")
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (3, 5, 6), "dy": (3, 5, 6), "gain": (6,), "offset": (6,), "w1": (8, 6), "b1": (8,),
              "w2": (6, 8), "b2": (6,)}  # fmt: skip
    whole = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    torch.save(whole, root / "pair.pt")
    return root


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What sharded.py leaves, a rank an entry."""
    done = torchrun(2, HERE / "sharded.py", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_of_two_ranks_are_those_of_transformers(folder, found, name):
    dense = load_hf(folder / LAYOUTS[name][0])
    for rank, mine in enumerate(found):
        assert difference(mine[name], run_hf(dense, tokens(3)[rows(name, rank)])) <= 1e-5


def test_experts_in_a_grouped_gemm_survive_a_checkpoint(found):
    for mine in found:
        assert torch.equal(mine["checkpoint"], mine["moe_ep"])


def test_a_column_and_a_row_have_the_gradients_of_whole_layers(folder, found):
    whole = {n: t.requires_grad_() for n, t in torch.load(folder / "pair.pt").items()}
    normed = F.layer_norm(whole["x"], (6,), whole["gain"], whole["offset"])
    y = F.linear(F.linear(normed, whole["w1"], whole["b1"]).sin(), whole["w2"], whole["b2"])
    (y * whole["dy"].detach()).sum().backward()
    want = {n: t.grad for n, t in whole.items() if n != "dy"} | {"y": y.detach()}
    cuts = {"w1": 0, "b1": 0, "w2": 1}
    for name, tensor in want.items():
        for rank, mine in enumerate(found):
            share = tensor.chunk(2, cuts[name])[rank] if name in cuts else tensor
            assert difference(mine["pair"][name], share) <= 1e-6, name


def test_shares_of_a_fresh_weight_differ_and_copies_do_not(found):
    one, other = (mine["fresh"] for mine in found)
    assert not torch.isclose(one["cut"], other["cut"]).any()
    assert torch.equal(one["copied"], other["copied"])


def test_what_is_not_parallel_here_is_refused():
    for kind in (te.Linear, te.LayerNormLinear):
        with pytest.raises(NotImplementedError, match="set sequence_parallel=False"):
            kind(4, 4, parallel_mode="column", tp_size=2, sequence_parallel=True)
    with pytest.raises(ValueError, match="out_features=5 does not divide over 2 tensor-parallel ranks"):
        te.Linear(4, 5, parallel_mode="column", tp_size=2)
    with pytest.raises(ValueError, match="set bias=False"):
        te.GroupedLinear(2, 4, 4, parallel_mode="row", tp_size=2)
    layer = te.Linear(4, 4, parallel_mode="row", tp_size=2)
    with pytest.raises(RuntimeError, match=r"call set_tensor_parallel_group\(\)"):
        layer(torch.ones(1, 2))


def test_attention_knows_the_groups_of_its_rank():
    attention = te.DotProductAttention(8, 4, num_gqa_groups=4, tp_size=2)
    q, k = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 2, 4)
    assert attention(q, k, k).shape == (3, 1, 16)
    with pytest.raises(ValueError, match="keys have 4 heads; expected 2, 4 groups over 2"):
        attention(q, torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4))
