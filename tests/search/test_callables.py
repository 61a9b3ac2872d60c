"""Names and fingerprints of users' functions, of every kind that can be called."""

from __future__ import annotations

import functools
import json

import pytest

from mbridge_prune.evaluate.score_functions import score_function
from mbridge_prune.search.callables import identity_of, name_of


class Narrow:
    def __init__(self, limit: int):
        self.limit, self.cache = limit, object()

    def __call__(self, sizes):
        return sizes["hidden_size"] <= self.limit

    def method(self, sizes):
        return self(sizes)


def narrow(sizes, limit=48):
    return sizes["hidden_size"] <= limit


def closed(limit):
    return lambda sizes: sizes["hidden_size"] <= limit


KINDS = {
    "function": lambda n: functools.partial(narrow, limit=n),
    "positional": lambda n: functools.partial(lambda limit, sizes: sizes["hidden_size"] <= limit, n),
    "object": Narrow,
    "method": lambda n: Narrow(n).method,
    "closure": closed,
    "partial of an object": lambda n: functools.partial(Narrow(n)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_callable_has_bound_is_part_of_it(kind):
    make = KINDS[kind]
    assert name_of(make(48)) and identity_of(make(48)) == identity_of(make(48)) != identity_of(make(32))
    assert "0x" not in json.dumps(identity_of(make(48))), "an address is another one in another process"


def test_an_edited_function_is_another(tmp_path):
    def imported(body, name):
        file = tmp_path / f"{name}.py"
        file.write_text(f"def mine(sizes):\n    return {body}\n")
        scope: dict = {}
        exec(compile(file.read_text(), file, "exec"), scope)
        return scope["mine"]

    assert identity_of(imported("True", "a")) == identity_of(imported("True", "b"))
    assert identity_of(imported("True", "a")) != identity_of(imported("False", "c"))


def test_names():
    assert (name_of(narrow), name_of(functools.partial(narrow)), name_of(Narrow(3))) == (
        "narrow",
        "narrow",
        "Narrow",
    )
    assert name_of(functools.partial(Narrow(3).method)) == "Narrow.method" and name_of(len) == "len"
    loss = score_function("loss", tokens_ns=__import__("torch").zeros(2, 4, dtype=int))
    assert name_of(loss) == "loss" and identity_of(loss) == loss.fingerprint
    assert identity_of(len) == {"name": "len", "source": None}
