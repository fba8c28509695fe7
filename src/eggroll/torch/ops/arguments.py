"""One order of arguments for every rule: what a call names by keyword is put where torch's own signature has it.

``F.linear(input=x, weight=w)`` and ``F.linear(x, w)`` are the same call, and rules see the second. Only calls with
keywords come here; how such a call is put in order is worked out once for each function and set of names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ALIASES = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}
"""The names of NumPy that torch takes for its own."""

Order = tuple[tuple[str, ...], tuple[tuple[str, str], ...]]
"""Keywords that become positional arguments, in order, and the others with torch's own name of each."""


def bind(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments in torch's own order, by position as far as there is no gap, the rest by torch's names."""
    positional, named = _order(func, len(args), tuple(kwargs))
    return (*args, *[kwargs[name] for name in positional]), {own: kwargs[given] for own, given in named}


@functools.cache
def _order(func: Callable[..., Any], given: int, names: tuple[str, ...]) -> Order:
    unchanged = (), tuple((name, name) for name in names)
    for signature in signatures(func):
        own = {_own_name(name, signature): name for name in names}
        places = [name for name, by_position in signature if by_position]
        if len(own) < len(names) or not own.keys() <= {name for name, _ in signature}:
            continue
        if given > len(places) or own.keys() & set(places[:given]):
            continue
        positional = []
        for name in places[given:]:
            if name not in own:
                break
            positional.append(own.pop(name))
        return tuple(positional), tuple(own.items())
    return unchanged  # torch itself will say what is wrong with it


def _own_name(name: str, signature: Sequence[tuple[str, bool]]) -> str:
    return name if any(name == own for own, _ in signature) else ALIASES.get(name, name)


@functools.cache
def signatures(func: Callable[..., Any]) -> tuple[tuple[tuple[str, bool], ...], ...]:
    """The names of a torch function's arguments, and whether each may be given by position, for every overload."""
    try:
        parameters = inspect.signature(func).parameters.values()
    except (ValueError, TypeError):
        schemas = _schemas(func)
        by_name = {argument.name for schema in schemas for argument in schema.arguments if argument.kwarg_only}
        return tuple(dict.fromkeys(_of_schema(func, schema, by_name) for schema in schemas))
    names = []
    for parameter in parameters:
        if parameter.kind == parameter.VAR_POSITIONAL:
            names.append((parameter.name, False))  # nothing can be put behind it
            break
        if parameter.kind != parameter.VAR_KEYWORD:
            # inplace is asked for by name, to tell a write
            by_position = parameter.kind != parameter.KEYWORD_ONLY and parameter.name != "inplace"
            names.append((parameter.name, by_position))
    names += [(p.name, False) for p in parameters if p.kind == p.KEYWORD_ONLY and (p.name, False) not in names]
    return (tuple(names),)


def _schemas(func: Callable[..., Any]) -> list[Any]:
    """The schemas of a builtin: ``torch.matmul``, ``Tensor.matmul``, ``torch._C._nn.linear``."""
    name = getattr(func, "__name__", "")
    try:
        return list(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))
    except RuntimeError:
        return []


def _of_schema(func: Callable[..., Any], schema: Any, by_name: set[str]) -> tuple[tuple[str, bool], ...]:
    """A schema as Python has it: what it calls ``self`` is ``input`` of a function, and comes first in a method."""
    arguments = [(argument.name, argument.name not in by_name) for argument in schema.arguments]
    if getattr(Tensor, schema.name.removeprefix("aten::"), None) is func:
        return tuple(sorted(arguments, key=lambda argument: argument[0] != "self"))
    return tuple(("input" if name == "self" else name, by_position) for name, by_position in arguments)
