"""The slice table of a transformers model: its blocks are cut, everything around them stays whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn

from mbridge_prune.dynamic import Scope, SliceTable, registered
from mbridge_prune.dynamic.module import DynamicModule
from mbridge_prune.errors import UserError
from mbridge_prune.huggingface.block import FAMILY, DynamicBlock

log = logging.getLogger("mbridge_prune")
SUPPORTED = "BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT, GPT-J, GPT-NeoX, GPT-2"


class AroundBlocks(DynamicModule):
    """What is no block: embeddings, norms, poolers, heads. The hidden size stays, and so do they."""

    def __init__(self, module: nn.Module, scope: Scope, blocks: list[str]):
        super().__init__(module, scope)
        tensors = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        tensors += [n for n, _ in module.named_buffers(remove_duplicate=False)]
        inside = tuple(f"{name}." for name in blocks)
        self.untouched = tuple(name for name in tensors if not name.startswith(inside))


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[DynamicBlock]]]:
    """(name, block, its wrapper), in the order of the layers."""
    for name, module in model.named_modules():
        wrapper = registered(type(module), FAMILY)
        if wrapper is not None and issubclass(wrapper, DynamicBlock):
            yield name, module, wrapper


def table_of(model: nn.Module) -> SliceTable:
    """The slice table; axes are named `layers.<n>.num_attention_heads` and `layers.<n>.ffn_hidden_size`.

    Raises:
        UserError: no block that can be pruned is in the model, or one that only looks like it.
    """
    found = list(blocks_of(model))
    if not found:
        raise UserError(
            f"gradnas knows no block of {type(model).__name__}{_seen(model)}; it prunes {SUPPORTED} of "
            "transformers, alone or inside a module of yours. Megatron language models: "
            "mode='mcore_minitron'; vision models: mode='fastnas'"
        )
    around = AroundBlocks(model, Scope(), [name for name, _, _ in found])
    wrappers: list[DynamicModule] = [
        wrapper(block, Scope(path=name, place=f"layers.{n}"))
        for n, (name, block, wrapper) in enumerate(found)
    ]
    return SliceTable.made_of(model, [*wrappers, around])


def _seen(model: nn.Module) -> str:
    """The classes that are repeated in a list, which are what a person calls its layers."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    names = sorted({type(m[0]).__name__ for m in lists})
    return f" (layers: {', '.join(names)})" if names else ""
