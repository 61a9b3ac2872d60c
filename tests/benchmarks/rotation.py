"""Whether a rotation of the residual stream by its principal axes makes a hidden cut better (`rotate: pca`).

    python tests/benchmarks/rotation.py HF_FOLDER CALIBRATION_TEXT HELD_OUT_TEXT... [--hidden 512]

Plain transformers, a Llama whose head is tied. Gains of norms are folded into the weights behind them, all weights
are turned by the eigenvectors of the second moments that the norms put out (summed over all norms), and the leading
axes stay. Prints loss over the full model's for: the rotation with an output layer of its own (hidden x vocabulary
parameters more); with least squares for the readers besides; and tied, where the gain of the last norm must stay a
gain, so that only the diagonal of Q^T gain Q is kept.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from mbridge_prune.bridge.load import load_tokenizer
from mbridge_prune.calibration.packing import calibration_tokens
from mbridge_prune.evaluate.loss import token_losses

RIDGE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = load_tokenizer(str(args.model), False)
    text = calibration_tokens(args.calibration, tokenizer, args.samples, args.seq_length)
    held_out = {
        Path(name).name: calibration_tokens(
            name, tokenizer, args.windows, args.seq_length, split="validation"
        )
        for name in args.texts
    }
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    dense = losses(model, held_out)

    gain = fold_gains(model)  # the output layer is untied from here on
    moments = second_moments(model, text)
    whole = sum(moments.values())
    energies, axes = torch.linalg.eigh(whole)  # type: ignore[arg-type]
    order = energies.argsort(descending=True)
    rotation = axes[:, order]
    rotate(model, rotation.float())
    moments = {norm: rotation.T @ moment @ rotation for norm, moment in moments.items()}
    share = float(energies[order][: args.hidden].sum() / energies.sum())
    rows = [
        ("full", dense),
        (f"gains folded, turned, nothing cut; {args.hidden} axes hold {share:.4f} of the energy", None),
        ("turned, cut, untied", None),
        ("turned, cut, least squares for the readers, untied", None),
        ("turned, nothing cut, tied", None),
        ("turned, cut, tied", None),
    ]
    results: list[dict[str, float]] = [dense, losses(model, held_out)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for least_squares in (False, True):
        cut(model, args.hidden, moments, least_squares)
        results.append(losses(model, held_out))
        restore(model, state)
    tie(model, gain, rotation)
    results.append(losses(model, held_out))
    cut(model, args.hidden, moments, False)
    results.append(losses(model, held_out))
    print("| what | " + " | ".join(held_out) + " |")
    print("| --- |" + " ---: |" * len(held_out))
    for (what, _), found in zip(rows, results, strict=True):
        less = dense if what != "full" else dict.fromkeys(held_out, 0.0)
        print(f"| {what} | " + " | ".join(f"{found[name] - less[name]:.3f}" for name in held_out) + " |")


def losses(model: Any, held_out: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(token_losses(model, tokens).mean()) for name, tokens in held_out.items()}


def readers(model: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """Every norm, and the linear layers that read what it puts out."""
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield (
            f"{number} attention",
            layer.input_layernorm,
            [attention.q_proj, attention.k_proj, attention.v_proj],
        )
        yield f"{number} mlp", layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]
    yield "last", model.model.norm, [model.lm_head]


def writers(model: Any) -> Iterator[Any]:
    for layer in model.model.layers:
        yield from (layer.self_attn.o_proj, layer.mlp.down_proj)


@torch.no_grad()
def fold_gains(model: Any) -> torch.Tensor:
    """Gains become ones; returns that of the last norm."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    last = model.model.norm.weight.clone()
    for _, norm, linears in readers(model):
        for linear in linears:
            linear.weight.mul_(norm.weight)
        norm.weight.fill_(1.0)
    return last


@torch.no_grad()
def second_moments(model: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """[hidden, hidden] in fp64: the mean over tokens of x x^T, of what every norm puts out."""
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            x = out.flatten(0, -2).double()
            sums[name] = sums[name] + x.T @ x / text.numel()

        return see

    hooks = [norm.register_forward_hook(hook(name)) for name, norm, _ in readers(model)]
    for sample in text:
        model.model(sample[None])
    for handle in hooks:
        handle.remove()
    return dict(sums)


@torch.no_grad()
def rotate(model: Any, rotation: torch.Tensor) -> None:
    for _, _, linears in readers(model):
        for linear in linears:
            linear.weight.copy_(linear.weight @ rotation)
    for linear in writers(model):
        linear.weight.copy_(rotation.T @ linear.weight)
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight @ rotation)


@torch.no_grad()
def cut(model: Any, kept: int, moments: dict[str, torch.Tensor], least_squares: bool) -> None:
    """The leading axes stay; gains scale as the product's `norm` repair does."""
    for name, norm, linears in readers(model):
        moment = moments[name]
        energy = moment.diagonal()
        scale = float((energy[:kept].mean() / energy.mean()).sqrt())
        norm.weight = nn.Parameter(norm.weight[:kept] * scale)
        fit = torch.linalg.solve(
            moment[:kept, :kept] + RIDGE * energy[:kept].diag(), moment[:kept, kept:]
        ).T.float()
        for linear in linears:
            weight = linear.weight[:, :kept]
            if least_squares:
                weight = weight + linear.weight[:, kept:] @ fit
            linear.weight = nn.Parameter(weight.clone())
    for linear in writers(model):
        linear.weight = nn.Parameter(linear.weight[:kept].clone())
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight[:, :kept].clone())


@torch.no_grad()
def restore(model: Any, state: dict[str, torch.Tensor]) -> None:
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(state[name].clone()))


@torch.no_grad()
def tie(model: Any, gain: torch.Tensor, rotation: torch.Tensor) -> None:
    """One matrix for embedding and output layer; of Q^T gain Q the last norm keeps the diagonal."""
    model.lm_head.weight = model.model.embed_tokens.weight
    turned = rotation.T @ gain.double().diag() @ rotation
    model.model.norm.weight = nn.Parameter(turned.diagonal().float())


if __name__ == "__main__":
    main()
