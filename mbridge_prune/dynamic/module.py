"""DynamicModule: what a wrapper declares about the module it stands for, and the registry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from mbridge_prune.dynamic.axis import Axis
from mbridge_prune.dynamic.slices import Follow, Probe, Slice
from mbridge_prune.errors import UserError


@dataclass(frozen=True)
class Scope:
    """What a module knows from above: where it stands and the axes it shares.

    Args:
        path: name inside the local model, for messages.
        layer: global layer number from 0, or None outside layers.
        axes: shared axes by hparam (`hidden_size`), handed down from the root.
        config: the model's configuration object.
    """

    path: str = ""
    layer: int | None = None
    axes: dict[str, Axis] = dataclasses.field(default_factory=dict)
    config: Any = None

    def axis(self, hparam: str, size: int, **options: Any) -> Axis:
        """A new axis of this place, its key made from the global layer number."""
        place = hparam if self.layer is None else f"layers.{self.layer}.{hparam}"
        return Axis(hparam, size, place, **options)

    def child(self, name: str, **changes: Any) -> Scope:
        """The scope of a submodule."""
        path = f"{self.path}.{name}" if self.path else name
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

    def children(self) -> Iterator[tuple[nn.Module, Scope]]:
        """Submodules with wrappers of their own, with their scope."""
        for name, child in self.module.named_children():
            yield child, self.scope.child(name)


Wrapper = TypeVar("Wrapper", bound=type[DynamicModule])
_REGISTRY: dict[type[nn.Module], type[DynamicModule]] = {}


def wraps(*classes: type[nn.Module]) -> Callable[[Wrapper], Wrapper]:
    """Registers the decorated DynamicModule for `classes`, exactly those (no subclass slips in)."""

    def register(wrapper: Wrapper) -> Wrapper:
        _REGISTRY.update(dict.fromkeys(classes, wrapper))
        return wrapper

    return register


def registered(cls: type[nn.Module]) -> type[DynamicModule] | None:
    """The wrapper of a module class, or None."""
    return _REGISTRY.get(cls)


def wrap_tree(module: nn.Module, scope: Scope) -> Iterator[DynamicModule]:
    """Wrappers of `module` and everything below it that holds tensors.

    Raises:
        UserError: a module with tensors of its own has no wrapper; it is named.
    """
    wrapper = registered(type(module))
    if wrapper is not None:
        dynamic = wrapper(module, scope)
        yield dynamic
        children = list(dynamic.children())
    else:
        own = [n for n, _ in module.named_parameters(recurse=False)]
        own += [n for n, _ in module.named_buffers(recurse=False)]
        if own:
            known = ", ".join(sorted(c.__name__ for c in _REGISTRY))
            raise UserError(
                f"unsupported layer {scope.path or '(root)'}: {type(module).__name__} has "
                f"{', '.join(own)}, and no wrapper is registered for it; supported: {known}"
            )
        children = [(child, scope.child(name)) for name, child in module.named_children()]
    for child, child_scope in children:
        yield from wrap_tree(child, child_scope)
