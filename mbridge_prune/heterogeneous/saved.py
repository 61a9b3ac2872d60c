"""A heterogeneous model in one file: its tensors and, in the header, as JSON, what makes it of the full one.

Nothing is unpickled. `restore` gives a freshly built model of the full architecture the shapes, plain
attributes and tensors of the file; it needs neither the mode nor its table.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mbridge_prune.dynamic import Follow, SliceTable
from mbridge_prune.errors import UserError
from mbridge_prune.files import write_tensors

FORMAT = "mbridge_prune model 1"
RECORD = "_mbridge_prune"
"""Where a pruned model carries what was done to it: a plain value that copies travel with."""


@dataclass
class Cut:
    """One prune: axis key -> size, and -> [groups][k] places kept inside each group, most important first."""

    mode: str
    sizes_before: dict[str, int]
    sizes_after: dict[str, int]
    kept: dict[str, list]
    config: dict[str, Any] = field(default_factory=dict)


@dataclass
class Architecture:
    """What makes the pruned model from the full one.

    Args:
        model: class of the model.
        full: tensor name -> its shape in the full model.
        attributes: "module path:name" -> [its value in the full model, its value now].
        cuts: what was done, in order.
    """

    model: str
    full: dict[str, list[int]]
    attributes: dict[str, list[Any]] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, table: SliceTable) -> Architecture:
        """That of a model as it is: pruned before, or full.

        Args:
            table: a buffer that is not persistent counts only if an axis of it is in there: any other one the
                model makes itself, maybe in its first forward.
        """
        axes = {id(e.tensor()) for e in table.entries if any(any(layout.axes()) for layout in e.dims)}
        own = _own_buffers(model)
        full = {name: list(t.shape) for name, t in tensors_of(model) if name not in own or id(t) in axes}
        known = getattr(model, RECORD, None)
        if isinstance(known, Architecture):
            attributes, cuts = dict(known.attributes), list(known.cuts)
            return dataclasses.replace(known, full={**full, **known.full}, attributes=attributes, cuts=cuts)
        return cls(type(model).__qualname__, full)

    def follow(self, model: nn.Module, follows: Sequence[Follow], before: Sequence[Any]) -> None:
        """Notes the attributes that a cut has changed."""
        for row, was in zip(follows, before, strict=True):
            now = getattr(row.owner, row.name)
            if now != was:
                place = f"{_path(model, row.owner)}:{row.name}"
                first = self.attributes[place][0] if place in self.attributes else _plain(was)
                self.attributes[place] = [first, _plain(now)]

    def attach(self, model: nn.Module) -> None:
        """The model carries its architecture from now on."""
        object.__setattr__(model, RECORD, self)


def save(model: nn.Module, path: str | Path) -> Path:
    """Saves a model that `prune` has cut (trained further or not), or `restore` has given back.

    Args:
        model: under DistributedDataParallel, what it wraps is saved.
        path: the file; rank 0 writes, aside first. One that `save` has written before is replaced.

    Raises:
        UserError: a model that was not pruned by a heterogeneous mode, or was changed since; a path where
            something else is; a file that cannot be written.
    """
    if getattr(model, RECORD, None) is None:  # a network may have a part called `module` as well
        model = getattr(model, "module", model)
    path, found = Path(path), getattr(model, RECORD, None)
    if not isinstance(found, Architecture):
        raise UserError(
            f"{type(model).__name__} was not pruned by fastnas or gradnas: save keeps their "
            "heterogeneous results; an mcore_minitron result is an ordinary model (mbridge_prune.export_hf)"
        )
    tensors = _saved(model, found)
    if any(name.endswith("_extra_state") for name in model.state_dict(keep_vars=True)):
        raise UserError(
            f"{type(model).__name__} keeps an extra state, which is no tensor: it cannot be saved"
        )
    if tensors.keys() != found.full.keys():
        names = sorted({*tensors} ^ {*found.full})
        raise UserError(f"the model has other tensors than when it was pruned: {', '.join(names[:5])}")
    if path.is_dir() or (path.exists() and _header(path).get("format") != FORMAT):
        raise UserError(f"{path} is there and is no model saved by mbridge_prune; give another path")
    metadata = {"format": FORMAT, "architecture": json.dumps(dataclasses.asdict(found))}
    write_tensors({name: tensor.detach() for name, tensor in tensors.items()}, path, metadata, "the model")
    return path


def restore(model: nn.Module, path: str | Path) -> nn.Module:
    """Gives a freshly built model of the full architecture the pruned shapes and weights of a file.

    Args:
        model: of the same class and shapes as the one that was pruned; changed in place.

    Returns:
        The same model; it computes what the saved one computed.

    Raises:
        UserError: no such file, no file of this kind, or a model of another architecture. Nothing has been
            changed then.
    """
    path = Path(path)
    header = _header(path)
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no model saved by mbridge_prune ({FORMAT!r} expected)")
    content = json.loads(header["architecture"])
    found = Architecture(**{**content, "cuts": [Cut(**cut) for cut in content["cuts"]]})
    tensors = _saved(model, found)
    problem = _difference(model, tensors, found)
    if problem:
        raise UserError(f"{path} is of another architecture than the model given: {problem}")
    with safe_open(str(path), "pt") as file, torch.no_grad():
        for name, tensor in tensors.items():
            tensor.data = file.get_tensor(name).to(tensor.device)
    for place, (_, now) in found.attributes.items():
        owner, name = _owner(model, place)
        setattr(owner, name, _value(now))
    found.attach(model)
    return model


def modes_of(model: nn.Module) -> list[str]:
    """The modes that have cut the model, in order."""
    return [cut.mode for cut in getattr(model, RECORD).cuts]


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _own_buffers(model: nn.Module) -> set[str]:
    """Buffers that are not persistent: the model makes them itself."""
    names = [(path, name) for path, m in model.named_modules() for name in m._non_persistent_buffers_set]
    return {f"{path}.{name}".lstrip(".") for path, name in names}


def _saved(model: nn.Module, found: Architecture) -> dict[str, torch.Tensor]:
    """The tensors that are in the file."""
    own = _own_buffers(model)
    return {name: t for name, t in tensors_of(model) if name not in own or name in found.full}


def _header(path: Path) -> Mapping[str, str]:
    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable model file: {error}") from error


def _difference(model: nn.Module, tensors: Mapping[str, torch.Tensor], found: Architecture) -> str:
    """What a fresh model has otherwise than the full one that was pruned; empty if nothing."""
    if getattr(model, RECORD, None) is not None:
        return "it is pruned already; restore takes a freshly built one"
    if type(model).__qualname__ != found.model:
        return f"it is a {type(model).__qualname__}, the file is of a {found.model}"
    for name in [*found.full, *tensors]:
        if name not in tensors or name not in found.full:
            return f"{name} is only in {'the file' if name in found.full else 'the model'}"
        if list(tensors[name].shape) != found.full[name]:
            return f"{name} is {tuple(tensors[name].shape)}, expected {tuple(found.full[name])}"
        if tensors[name].is_meta:
            return f"{name} is on the meta device; build the model on a real one"
    for place, (before, _) in found.attributes.items():
        owner, name = _owner(model, place)
        if not hasattr(owner, name) or getattr(owner, name) != _value(before):
            return f"{place} is {getattr(owner, name, None)!r}, expected {_value(before)!r}"
    return ""


def _path(model: nn.Module, owner: Any) -> str:
    """Where an owner hangs: a module's name, or that and the name of a plain attribute ("@config")."""
    for name, module in model.named_modules():
        if module is owner:
            return name
    for name, module in model.named_modules():
        for attribute, thing in vars(module).items():
            if thing is owner:
                return f"{name}@{attribute}"
    raise RuntimeError(f"a {type(owner).__name__} that follows a size hangs nowhere in the model: a bug")


def _owner(model: nn.Module, place: str) -> tuple[Any, str]:
    path, _, name = place.rpartition(":")
    module, _, attribute = path.partition("@")
    try:
        owner: Any = model.get_submodule(module)
        return (getattr(owner, attribute) if attribute else owner), name
    except AttributeError:
        return None, name


def _plain(value: Any) -> Any:
    """A value as JSON holds it; a tuple and a set are told from a list."""
    if isinstance(value, tuple):
        return {"tuple": [_plain(v) for v in value]}
    if isinstance(value, set):
        return {"set": [_plain(v) for v in sorted(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(v) for v in value]
    raise RuntimeError(f"an attribute of kind {type(value).__name__} cannot be saved: a bug")


def _value(plain: Any) -> Any:
    if isinstance(plain, dict):
        ((kind, values),) = plain.items()
        return {"tuple": tuple, "set": set}[kind](_value(v) for v in values)
    return [_value(v) for v in plain] if isinstance(plain, list) else plain
