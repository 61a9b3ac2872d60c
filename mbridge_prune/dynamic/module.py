"""DynamicModule: what a wrapper declares about the module it stands for, and the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from mbridge_prune.dynamic.axis import Axis, Sizes
from mbridge_prune.dynamic.slices import Consumer, Cost, Follow, Gain, Probe, Slice, Unit
from mbridge_prune.dynamic.stack import Stack
from mbridge_prune.errors import UserError

MEGATRON = "megatron"


@dataclass(frozen=True)
class Scope:
    """What a module knows from above: where it stands and the axes it shares.

    Args:
        path: name inside the local model, for messages.
        layer: global layer number from 0, or None outside layers.
        axes: shared axes by hparam (`hidden_size`), handed down from the root.
        config: the model's configuration object.
        place: where axes made here belong, the same in the whole model: "layers.3".
        unit: the unit (an expert) that all tensors here exist with.
        router: the module that says which token goes to which expert here.
        shards: tensor-parallel ranks that the weights are spread over.
        family: whose wrappers stand for the layers: the same `nn.Linear` means other things to other modes.
    """

    path: str = ""
    layer: int | None = None
    axes: dict[str, Axis] = dataclasses.field(default_factory=dict)
    config: Any = None
    place: str = ""
    unit: Unit | None = None
    router: nn.Module | None = None
    shards: int = 1
    family: str = MEGATRON

    def axis(self, hparam: str, size: int, **options: Any) -> Axis:
        """A new axis of this place."""
        return Axis(hparam, size, f"{self.place}.{hparam}" if self.place else hparam, **options)

    def child(self, name: str, **changes: Any) -> Scope:
        """The scope of a submodule; a global layer number gives it a place of its own."""
        path = f"{self.path}.{name}" if self.path else name
        if changes.get("layer") is not None:
            changes.setdefault("place", f"layers.{changes['layer']}")
        return dataclasses.replace(self, path=path, **changes)


class DynamicModule:
    """Wraps one module and declares, as data, what in it follows which axis.

    It holds the module and patches nothing. Subclasses override what applies; everything else
    (sorting, selecting, shrinking, counting, probing) is done by readers of these rows.
    """

    untouched: tuple[str, ...] = ()
    """Own parameters and buffers (names inside the module) that no axis touches."""

    def __init__(self, module: nn.Module, scope: Scope):
        self.module = module
        self.scope = scope

    def slices(self) -> Iterator[Slice]:
        """Rows: which tensor dimension follows which axis."""
        return iter(())

    def follows(self) -> Iterator[Follow]:
        """Plain attributes and config fields that follow a size."""
        return iter(())

    def probes(self) -> Iterator[Probe]:
        """Where which axis is observed."""
        return iter(())

    def consumers(self) -> Iterator[Consumer]:
        """Weights that read what prunable units write, for repairs."""
        return iter(())

    def gains(self) -> Iterator[Gain]:
        """Norms over prunable channels, for repairs."""
        return iter(())

    def costs(self) -> Iterator[Cost]:
        """What the layer keeps of a sequence, and what it computes besides products with weights."""
        return iter(())

    def stacks(self) -> Iterator[Stack]:
        """Modules or tensors that go as a whole when a unit goes (experts)."""
        return iter(())

    def check(self, sizes: Sizes) -> None:
        """Refuses full sizes (every hparam) that this layer cannot have, with what would work."""

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        """Submodules with wrappers of their own, with their scope."""
        for name, child in self.module.named_children():
            yield child, self.scope.child(name)


Wrapper = TypeVar("Wrapper", bound=type[DynamicModule])
_REGISTRY: dict[tuple[str, str], type[DynamicModule]] = {}
_MIXINS: set[str] = set()


def wraps(*classes: type[nn.Module] | str, family: str = MEGATRON) -> Callable[[Wrapper], Wrapper]:
    """Registers the decorated DynamicModule for `classes`, exactly those (no subclass slips in).

    A class may be given by its full name, where importing it only to name it would be a burden.
    `nn.Module` itself stands for every class that its family has no wrapper for.
    """

    def register(wrapper: Wrapper) -> Wrapper:
        _REGISTRY.update({(family, _full_name(cls)): wrapper for cls in classes})
        return wrapper

    return register


def ignores(*mixins: type | str) -> None:
    """Mixins that hold no tensors: a class made of nothing but them and a wrapped class is wrapped."""
    _MIXINS.update(map(_full_name, mixins))


def registered(cls: type[nn.Module], family: str = MEGATRON) -> type[DynamicModule] | None:
    """The wrapper of a module class in a family, or None."""
    wrapper = _REGISTRY.get((family, _full_name(cls)))
    if wrapper is None:
        names = [_full_name(base) for base in cls.__bases__]
        others = [name for name in names if name not in _MIXINS]
        if len(others) == 1 and len(names) > 1:
            wrapper = _REGISTRY.get((family, others[0]))
    return wrapper or _REGISTRY.get((family, _full_name(nn.Module)))


def _full_name(cls: type | str) -> str:
    return cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"


def wrap_tree(module: nn.Module, scope: Scope) -> Iterator[DynamicModule]:
    """Wrappers of `module` and everything below it that holds tensors.

    Raises:
        UserError: a module with tensors of its own has no wrapper; it is named.
    """
    wrapper = registered(type(module), scope.family)
    if wrapper is not None:
        dynamic = wrapper(module, scope)
        yield dynamic
        children = list(dynamic.children())
    else:
        own = [n for n, _ in module.named_parameters(recurse=False)]
        own += [n for n, _ in module.named_buffers(recurse=False)]
        if own:
            names = (name for family, name in _REGISTRY if family == scope.family)
            known = ", ".join(sorted(name.rpartition(".")[2] for name in names))
            raise UserError(
                f"unsupported layer {scope.path or '(root)'}: {type(module).__name__} has "
                f"{', '.join(own)}, and no wrapper is registered for it; supported: {known}"
            )
        children = [(child, scope.child(name)) for name, child in module.named_children()]
    for child, child_scope in children:
        yield from wrap_tree(child, child_scope)
