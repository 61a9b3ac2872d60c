"""save_pretrained and from_pretrained of a model whose layers have sizes of their own.

`config.json` carries the sizes (`mbridge_prune`), and, where transformers has a way to say them itself, that
too: `pruned_heads`, and the FFN size where it is the same in every layer. What transformers cannot build from
its own fields alone, `from_pretrained` builds here: the class of transformers, its blocks cut to the sizes
before the weights are read by transformers' own loading code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mbridge_prune.dynamic import shrink
from mbridge_prune.errors import UserError, nearest
from mbridge_prune.huggingface.block import FFN, HEADS
from mbridge_prune.huggingface.whole_model import blocks_of, table_of

FIELD = "mbridge_prune"
"""The field of config.json: axis key -> size, of every axis."""


def record(model: nn.Module) -> None:
    """Writes the sizes of a pruned model into the configurations that it is saved with."""
    for owner, config in _owners(model):
        sizes = sizes_of(owner)
        wrapper = next(wrapper for _, _, wrapper in blocks_of(owner))
        heads, ffn = (_by_layer(sizes, hparam) for hparam in (HEADS, FFN))
        setattr(config, FIELD, dict(sizes))
        full = config.num_attention_heads
        if wrapper.heads_in_config:
            config.pruned_heads = {n: list(range(left, full)) for n, left in enumerate(heads) if left < full}
        if wrapper.ffn_in_config and len(set(ffn)) == 1:
            setattr(config, wrapper.ffn_in_config, ffn[0])


def needs_us(model: nn.Module) -> str:
    """Why plain transformers cannot load what `save_pretrained` writes of a pruned model; empty if it can."""
    reasons = []
    for owner, config in _owners(model):
        sizes = sizes_of(owner)
        wrapper = next(wrapper for _, _, wrapper in blocks_of(owner))
        if not wrapper.heads_in_config:
            if any(left < config.num_attention_heads for left in _by_layer(sizes, HEADS)):
                reasons.append("fewer heads than hidden size / head size")
        if len(set(_by_layer(sizes, FFN))) > 1:
            reasons.append("an FFN size a layer")
    return " and ".join(dict.fromkeys(reasons))


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Axis key -> size, as the model is."""
    return {key: axis.size for key, axis in table_of(model).axes.items()}


def _owners(model: nn.Module) -> list[tuple[Any, Any]]:
    """Every configuration with the outermost transformers model that it is of.

    Two models that were built with one configuration get one each: their layers differ from now on.
    """
    found: list[tuple[Any, Any]] = []
    for owner in model.modules():
        if not hasattr(owner, "save_pretrained") or next(blocks_of(owner), None) is None:
            continue
        config: Any = owner.config
        outer = [o for o, known in found if known is config]
        if outer and not any(module is owner for o in outer for module in o.modules()):
            own = copy.deepcopy(config)
            for module in owner.modules():
                if getattr(module, "config", None) is config:
                    module.config = own  # type: ignore[assignment]
            found.append((owner, own))
        elif not outer:
            found.append((owner, config))
    return found


def _by_layer(sizes: Mapping[str, int], hparam: str) -> list[int]:
    """The sizes of one kind, in the order of the layers."""
    return [size for key, size in sizes.items() if key.endswith(f".{hparam}")]


def from_pretrained(folder: str | Path, model_class: Any = None, **options: Any) -> Any:
    """Loads what `save_pretrained` wrote of a pruned model; of any other model, as transformers does.

    Args:
        folder: of the model.
        model_class: a class of transformers; by default the one that was saved (`architectures`).
        **options: of transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        UserError: no such model, a class that transformers does not have, sizes that do not fit it.
    """
    import transformers

    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if model_class is None:
        name = (content.get("architectures") or ["(none)"])[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise UserError(
                f"{path} names the class {name}, which transformers {transformers.__version__} does not have"
                f"{nearest(name, dir(transformers))}; give model_class"
            )
    if FIELD not in content:
        return model_class.from_pretrained(folder, **options)
    shaped: Any = type(model_class.__name__, (_shaped_by(content[FIELD], str(path)), model_class), {})
    loaded = shaped.from_pretrained(folder, **options)
    found, model = (loaded[1:], loaded[0]) if isinstance(loaded, tuple) else ((), loaded)
    model.__class__ = model_class
    return (model, *found) if found else model


def _shaped_by(sizes: Mapping[str, int], where: str) -> type:
    """A base class that cuts the blocks as soon as a model is built, before its weights are read."""

    class Shaped:
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            cut_to(self, sizes, where)  # type: ignore[arg-type]

    return Shaped


def cut_to(model: nn.Module, sizes: Mapping[str, int], where: str) -> None:
    """Gives a freshly built model the sizes; its weights do not matter yet.

    Raises:
        UserError: sizes of another architecture.
    """
    table = table_of(model)
    if sizes.keys() != table.axes.keys():
        others = sorted({*sizes} ^ {*table.axes})
        raise UserError(
            f"{where}: {FIELD} names other axes than {type(model).__name__} has: {', '.join(others[:4])}"
        )
    table.check(dict(sizes))
    shrink(table, sizes)
