"""Who a user's function is: its name, and a fingerprint that changes when what it does may have."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mbridge_prune.errors import UserError

PLAIN = (str, int, float, complex, bool, bytes, type(None))


@dataclass(frozen=True)
class Named:
    """A function that was imported by its name.

    Args:
        fingerprint: of the source of its whole module.
    """

    name: str
    fingerprint: str
    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def allows(wanted: Callable[[dict[str, int]], bool] | None, sizes: Mapping[str, int]) -> bool:
    """Whether a candidate filter lets sizes through; None lets all.

    Raises:
        UserError: the filter fails, or returns nothing.
    """
    if wanted is None:
        return True
    try:
        said = wanted(dict(sizes))
        if said is not None:
            return bool(said)
    except Exception as error:  # the user's own code
        raise UserError(
            f"candidate_filter {name_of(wanted)} failed for {dict(sizes)}: {type(error).__name__}: {error}"
        ) from error
    raise UserError(
        f"candidate_filter {name_of(wanted)} returned None for {dict(sizes)}, expected True or False"
    )


def name_of(function: Callable[..., Any]) -> str:
    """A function's own name, whatever kind of callable it is."""
    name = getattr(function, "name", None)
    if isinstance(name, str):
        return name
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def identity_of(function: Callable[..., Any]) -> Any:
    """Plain values that are the same for the same function in another process.

    A `fingerprint` of its own counts. Otherwise: name, source, and the plain values it has bound
    (defaults, closure, arguments of a partial, attributes of an object); what has no source goes by name.
    """
    own = getattr(function, "fingerprint", None)
    if own is not None:
        return dict(own) if isinstance(own, Mapping) else str(own)
    found = {"name": name_of(function), "source": _source(function)}
    bound = repr(_bound(function))
    return {**found, "bound": _hash(bound)} if bound != "()" else found


def _source(function: Any) -> str | None:
    while isinstance(function, functools.partial):
        function = function.func
    code = function if inspect.isroutine(function) else type(function)
    try:
        return _hash(inspect.getsource(code))
    except (OSError, TypeError):
        return None


def _bound(function: Any) -> tuple[Any, ...]:
    """The plain values that a callable carries, in a fixed order."""
    if isinstance(function, functools.partial):
        return (*_values(function.args), *_items(function.keywords), *_bound(function.func))
    if inspect.ismethod(function):
        return (*_items(vars(function.__self__)), *_bound(function.__func__))
    if inspect.isfunction(function):
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        return (
            *_values(function.__defaults__ or ()),
            *_items(function.__kwdefaults__ or {}),
            *_values(cells),
        )
    return _items(getattr(function, "__dict__", {}))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a name that is not bound yet
        return False


def _values(values: Any) -> tuple[Any, ...]:
    return tuple(plain_of(value) for value in values)


def _items(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, plain_of(values[name])) for name in sorted(values))


def plain_of(value: Any) -> Any:
    """A plain value as it is, containers of them too; of anything else its type."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return _values(value)
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(repr, _values(value))))
    if isinstance(value, Mapping):
        return tuple(sorted(((repr(k), plain_of(v)) for k, v in value.items()), key=repr))
    return type(value).__qualname__


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
