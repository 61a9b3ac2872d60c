"""Runs on two ranks what test_tensor_parallel.py checks.

    torchrun --nproc-per-node 2 tests/reference/sharded.py FOLDER

Takes models, prompts and weights from the folder, and leaves `found-<rank>.pt` there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mbridge_prune  # noqa: F401  isort: skip
import torch
import transformer_engine.pytorch as te

from mbridge_prune import cli, runtime
from mbridge_prune.bridge.load import open_bridge
from mbridge_prune.bridge.megatron import load_mbridge_model_from_megatron, save_megatron
from mbridge_prune.bridge.quiet import quiet

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model, arguments of build)
    "llama": ("llama", {"tp": 2}),
    "one_group": ("one_group", {"tp": 2}),
    "moe_tp": ("moe", {"tp": 2}),
    "moe_tp_ep": ("moe", {"tp": 2, "ep": 2, "grouped": True}),
    "moe_etp": ("moe", {"tp": 2, "etp": 2, "grouped": True}),
    "moe_etp_allgather": ("moe", {"tp": 2, "etp": 2, "moe_token_dispatcher_type": "allgather"}),
    "moe_ep": ("moe", {"ep": 2, "grouped": True}),
    "moe_ep_allgather": ("moe", {"ep": 2, "grouped": True, "moe_token_dispatcher_type": "allgather"}),
}


def start(tp: int = 1, ep: int = 1, etp: int = 1) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    model_parallel_cuda_manual_seed(1234)


def build(
    path: Path, tp: int = 1, ep: int = 1, etp: int = 1, grouped: bool = False, **more: Any
) -> tuple[Any, list[Any]]:
    """(bridge, Megatron's chunks); `etp` ranks share out the weights of one expert."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
    }
    bridge, provider = open_bridge(path, {"seq_length": 16, **more}, grouped, weights=True)
    for name, size in sizes.items():  # more layouts than models are scored under
        setattr(provider, name, size)
    provider.finalize()
    start(tp, ep, etp)
    with quiet():
        return bridge, provider.provide_distributed_model(wrap_with_ddp=False)


@torch.no_grad()
def logits(model: list[Any], ids_bs: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    places = torch.arange(ids_bs.shape[1]).expand_as(ids_bs)
    share = model[0].eval()(ids_bs, places, None)
    return gather_from_tensor_model_parallel_region(share, group=runtime.group("tp"))


def rows(name: str, rank: int) -> slice:
    """The prompts a rank sees: all under tensor parallelism, its own under expert parallelism alone.

    An all-gather wants as many on every rank, an all-to-all does not.
    """
    if "ep" not in LAYOUTS[name][1] or "tp" in LAYOUTS[name][1]:
        return slice(None)
    return (slice(0, 2), slice(1, 3) if name == "moe_ep_allgather" else slice(2, 3))[rank]


def pair(folder: Path) -> dict[str, torch.Tensor]:
    """A norm, a column-parallel and a row-parallel layer, forward and backward."""
    start(tp=2)
    rank, group = runtime.rank(), runtime.group("tp")
    whole = torch.load(folder / "pair.pt")
    options = {"params_dtype": torch.float64, "tp_size": 2}
    first = te.LayerNormLinear(6, 8, parallel_mode="column", tp_group=group, **options)
    last = te.Linear(8, 6, parallel_mode="row", **options)
    last.set_tensor_parallel_group(group)
    with torch.no_grad():
        first.layer_norm_weight.copy_(whole["gain"])
        first.layer_norm_bias.copy_(whole["offset"])
        first.weight.copy_(whole["w1"].chunk(2)[rank])
        first.bias.copy_(whole["b1"].chunk(2)[rank])
        last.weight.copy_(whole["w2"].chunk(2, 1)[rank])
        last.bias.copy_(whole["b2"])
    x = whole["x"].requires_grad_()
    # A transposed input makes the gradient that is summed over the ranks a strided one.
    y = last(first(x.transpose(0, 1)).sin()).transpose(0, 1)
    (y * whole["dy"]).sum().backward()
    return {
        "y": y.detach(), "x": x.grad, "gain": first.layer_norm_weight.grad, "offset": first.layer_norm_bias.grad,
        "w1": first.weight.grad, "b1": first.bias.grad, "w2": last.weight.grad, "b2": last.bias.grad,
    }  # fmt: skip


def fresh_weights() -> dict[str, torch.Tensor]:
    """Untrained weights of Megatron's layers: shares of one matrix, and copies of one."""
    from megatron.core.extensions.transformer_engine import TELinear, TERowParallelLinear
    from megatron.core.transformer import TransformerConfig

    start(tp=2)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2
    )
    options = {"config": config, "init_method": torch.nn.init.normal_, "bias": True, "skip_bias_add": False}
    parallel = {"input_is_parallel": True, "is_expert": False, "tp_group": runtime.group("tp")}
    cut = TERowParallelLinear(8, 4, **parallel, **options)
    copied = TELinear(8, 4, parallel_mode="duplicated", skip_weight_param_allocation=False, **options)
    assert (cut.weight.tensor_model_parallel, cut.weight.partition_dim) == (True, 1)
    return {"cut": cut.weight.detach(), "copied": copied.weight.detach()}


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    runtime.start_distributed()
    found: dict[str, Any] = {"pair": pair(folder), "fresh": fresh_weights()}
    ids_bs = torch.load(folder / "prompts.pt")
    for name, (model, layout) in LAYOUTS.items():
        bridge, chunks = build(folder / model, **layout)
        mine = ids_bs[rows(name, runtime.rank())]
        found[name] = logits(chunks, mine)
        if name == "moe_ep":
            save_megatron(bridge, chunks, folder / "megatron")
            again = load_mbridge_model_from_megatron(
                megatron_path=folder / "megatron", hf_model_name_or_path=str(folder / model),
                provider_overrides={"seq_length": 16, "expert_model_parallel_size": layout["ep"]},
            )  # fmt: skip
            found["checkpoint"] = logits(again.model, mine)
    torch.save(found, folder / f"found-{runtime.rank()}.pt")
    runtime.barrier()
    return 0


if __name__ == "__main__":
    cli.leave(cli.run(main, sys.argv[1:]))
