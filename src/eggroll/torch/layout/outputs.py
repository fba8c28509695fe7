"""Where a module's outputs hold the members: found by comparing two calls, cut into members, joined again.

What grows with the number of rows holds them: a dimension, or a list with an entry for every row (detectors). What does
not is each member's own (a loss, a learned scale), and gets the members in front: ``(P, *shape)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.layout.rows import member_data
from eggroll.torch.perturbed import MemberTensor, PerturbedWeight

Place = int | None | Literal["list"]
"""A tensor's dimension with the rows, a list with an entry for each of them, or neither."""


@dataclass(frozen=True)
class Places:
    """Where every leaf of a module's outputs holds the rows."""

    leaves: tuple[Place, ...]

    @classmethod
    def of(cls, one: Any, many: Any, rows: int, factor: int, batch_dim: int) -> Places | None:
        """From the outputs for ``rows`` rows and for ``factor`` times as many; ``None`` if that does not tell.

        Args:
            one: outputs of one member.
            many: outputs for more rows.
            rows: of ``one``.
            factor: how many times as many rows ``many`` has, at least 2.
            batch_dim: the dimension to prefer where several grow.
        """
        few, structure = tree_flatten(one)
        more, other = tree_flatten(many)
        if structure != other:
            few, structure = _with_lists(one, rows)
            more, other = _with_lists(many, rows * factor)
        if structure != other:
            return None
        return cls(tuple(_place(x, y, factor, batch_dim) for x, y in zip(few, more, strict=True)))

    @classmethod
    def likely(cls, one: Any, rows: int, batch_dim: int) -> Places:
        """By sizes alone, where no other call can be made."""
        places: list[Place] = []
        for x in tree_flatten(one)[0]:
            found = [
                dim for dim in (batch_dim, 0, 1) if isinstance(x, Tensor) and x.ndim > dim and x.shape[dim] == rows
            ]
            grown = isinstance(x, Tensor) and x.ndim > 0 and rows > 0 and x.shape[0] % rows == 0
            places.append(found[0] if found else 0 if grown else None)
        return cls(tuple(places))

    def flat(self, tree: Any, rows: int) -> list[Any]:
        """The leaves that :attr:`leaves` speaks of."""
        return self._flat(tree, rows)[0]

    def cut(self, tree: Any, p: int, members: int, rows: int) -> Any:
        """Member ``p``'s part of joint outputs; ``rows`` are those of all members.

        Raises:
            ValueError: outputs of another form.
        """
        leaves, structure = self._flat(tree, rows)
        return tree_unflatten([_part(x, at, p, members) for x, at in self._paired(leaves)], structure)

    def own_entries(self, tree: Any, p: int, members: int, rows: int) -> Any:
        """Joint outputs with the lists that have an entry for each row cut to those of member ``p``."""
        leaves, structure = self._flat(tree, rows)
        return tree_unflatten(
            [_part(x, at, p, members) if at == "list" else x for x, at in self._paired(leaves)], structure
        )

    def join(self, outputs: Sequence[Any], rows: int) -> Any:
        """The outputs of all members, of ``rows`` rows each, as joint ones.

        Raises:
            UnsupportedOperationError: they have other sizes beside their rows.
            ValueError: outputs of another form.
        """
        flat, structures = zip(*(self._flat(output, rows) for output in outputs), strict=True)
        joined = [_together(parts, at) for parts, at in self._paired(list(zip(*flat, strict=True)))]
        return tree_unflatten(joined, structures[0])

    def spread(self, tree: Any, members: int, rows: int) -> Any:
        """A joint call's outputs as :meth:`join` would give them: values written out, ``(P, *shape)`` without rows.

        Raises:
            UnsupportedOperationError: a value still holds all rows for every member: they were not recognized.
            ValueError: outputs of another form.
        """
        leaves, structure = self._flat(tree, rows)
        return tree_unflatten([_spread(x, at, members, rows) for x, at in self._paired(leaves)], structure)

    def _flat(self, tree: Any, rows: int) -> tuple[list[Any], TreeSpec]:
        return _with_lists(tree, rows) if "list" in self.leaves else tree_flatten(tree)

    def _paired(self, leaves: Sequence[Any]) -> list[tuple[Any, Place]]:
        return list(zip(leaves, self.leaves, strict=True))


def written_out(tree: Any, members: int, rows: int) -> Any:
    """Values among outputs as plain tensors ``(P, *shape)``.

    Raises:
        UnsupportedOperationError: a value still holds all rows for every member: they were not recognized.
    """
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([_plain(x, members, rows) for x in leaves], structure)


def _with_lists(tree: Any, rows: int) -> tuple[list[Any], TreeSpec]:
    """Lists with an entry for every row are leaves."""
    return tree_flatten(tree, is_leaf=lambda x: isinstance(x, list) and len(x) == rows)


def _place(x: Any, y: Any, factor: int, batch_dim: int) -> Place:
    if isinstance(x, list):
        return "list"
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim != y.ndim:
        return None
    dims = sorted(range(x.ndim), key=lambda dim: dim != batch_dim)
    return next((dim for dim in dims if y.shape[dim] == factor * x.shape[dim] > 0), None)


def _part(x: Any, at: Place, p: int, members: int) -> Any:
    if at == "list":
        own = len(x) // members
        return x[p * own : (p + 1) * own]
    if not isinstance(x, Tensor):
        return x
    if at is None:
        return x[p]
    return x.chunk(members, at)[p] if x.ndim > at and x.shape[at] % members == 0 else x


def _together(parts: Sequence[Any], at: Place) -> Any:
    if at == "list":
        return [entry for part in parts for entry in part]
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if len({tuple(size for dim, size in enumerate(part.shape) if dim != at) for part in parts}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts[:3])
        raise UnsupportedOperationError(
            f"the members' outputs have shapes of their own ({shapes}, ...), which do not fit into one tensor: "
            "evaluate each with population.member"
        )
    return torch.stack(list(parts)) if at is None else torch.cat(list(parts), dim=at)


def _spread(x: Any, at: Place, members: int, rows: int) -> Any:
    if isinstance(x, MemberTensor | PerturbedWeight):
        plain = _plain(x, members, rows)
        return torch.cat(list(plain), dim=at) if isinstance(at, int) else plain
    return x.expand(members, *x.shape) if isinstance(x, Tensor) and at is None else x


def _plain(x: Any, members: int, rows: int) -> Any:
    return member_data(x.by_member(), members, rows) if isinstance(x, MemberTensor | PerturbedWeight) else x
