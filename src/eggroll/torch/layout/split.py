"""Outputs cut into members: rows are in the batch's dimension, or where the probe of a module's calls found them.

A recurrent state ``(layers, R, h)`` holds its rows in the second dimension, and what belongs to no row (a buffer that
is returned as it is) is the same for all members. A tensor that a call gave is known by itself; one that was made from
such tensors, by its sizes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch.perturbed import Value

Known = int | Literal["shared", "own"]
"""The dimension with the rows; the same for all members; or in each member's own copy, ``(P, *shape)``."""

Form = tuple[int, tuple[int | None, ...]]


@dataclass(frozen=True)
class Found:
    """Where outputs of one form, of one module, hold rows, as far as that is not simply the batch's dimension."""

    leaves: tuple[Known | None, ...]

    @classmethod
    def of(cls, one: Any, many: Any, factor: int, batch_dim: int) -> Found | None:
        """From the outputs for one member and for ``factor`` times as many rows; ``None``: as usual."""
        few, more = tree_leaves(one), tree_leaves(many)
        if len(few) != len(more):
            return None
        leaves = tuple(_found(x, y, factor, batch_dim) for x, y in zip(few, more, strict=True))
        return cls(leaves) if any(leaf is not None for leaf in leaves) else None


def _found(x: Any, y: Any, factor: int, batch_dim: int) -> Known | None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or isinstance(y, Value) or x.ndim != y.ndim or x.ndim < 1:
        return None
    if x.shape == y.shape:
        return "shared" if x.is_floating_point() and x.numel() > 1 else None
    growing = [dim for dim in range(x.ndim) if y.shape[dim] == factor * x.shape[dim] > 0]
    if min(batch_dim, x.ndim - 1) in growing or len(growing) != 1:
        return None
    return growing[0]


def form_of(module: nn.Module, outputs: Any) -> Form:
    """What outputs with the same places of rows have in common."""
    return id(module), tuple(x.ndim if isinstance(x, Tensor) else None for x in tree_leaves(outputs))


class Outputs:
    """What calls of a model gave: tensors whose rows are not simply in the batch's dimension.

    Attributes:
        unprobed: whether some call was not preceded by one that shows where its outputs hold rows.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()
        self._second: set[tuple[int, ...]] = set()
        self.unprobed = False

    def note(self, outputs: Any, places: Collection[Known | None]) -> None:
        """Remember where the tensors of a call's outputs hold rows; ``None`` where it is the batch's dimension."""
        for x, place in zip(tree_leaves(outputs), places, strict=True):
            if place is not None and isinstance(x, Tensor) and not isinstance(x, Value):
                self._known[x] = place
                if place == 1:
                    self._second.add(tuple(x.shape[:2]))

    def place(self, y: Tensor, members: int, rows: Collection[int], batch_dim: int) -> Known:
        """Where a tensor holds the rows of all members.

        Args:
            y: an output, or something made of one.
            members: P.
            rows: R of the calls that it may be from.
            batch_dim: where the batch is.

        Raises:
            UnsupportedOperationError: it does not hold them, or its sizes do not tell where.
        """
        if y in self._known:
            return self._known[y]  # type: ignore[no-any-return]
        dim = min(batch_dim, max(y.ndim - 1, 0))
        usual = y.ndim > 0 and holds_rows(y, dim, members, rows)
        like_a_state = tuple(y.shape[:2]) in self._second or (self.unprobed and y.ndim == 3 and y.shape[0] not in rows)
        if dim == 0 and y.ndim > 1 and y.shape[1] in rows and like_a_state:
            if not usual:
                return 1
            raise UnsupportedOperationError(
                f"the rows of {members} members can be in dimension 0 or 1 of a tensor of shape {tuple(y.shape)}. "
                "Split the model's own output instead of what was made of it, another batch size may tell them apart, "
                "or say which one holds the rows: split(y, dim=1)"
            )
        if usual:
            return dim
        held = f"the {max(rows)} rows of " if rows and y.ndim else ""
        raise UnsupportedOperationError(
            f"an output of shape {tuple(y.shape)} does not hold {held}{members} members: the model mixes its "
            'rows, or the tensor is no output of it. Use mode="vmap" or mode="loop"'
        )


def holds_rows(y: Tensor, dim: int, members: int, rows: Collection[int]) -> bool:
    """Whether a dimension is as long as rows of members can be."""
    size = y.shape[dim]
    # A search with beams returns fewer rows than the model computed.
    fewer = not y.is_floating_point() and any(count % max(size, 1) == 0 for count in rows)
    return size % members == 0 and (not rows or fewer or any(size % count == 0 for count in rows))


def split_tensor(y: Tensor, place: Known, members: int) -> Tensor:
    """``(..., R, ...)`` to ``(members, ..., R / members, ...)``."""
    if place == "own":
        return y
    if place == "shared":
        return y.expand(members, *y.shape)
    assert isinstance(place, int)
    return y.unflatten(place, (members, -1)).movedim(place, 0)


def split_tree(
    tree: Any, outputs: Outputs, members: int, rows: Collection[int], batch_dim: int, dim: int | None = None
) -> Any:
    """The plain tensors of a structure for each member; ``dim`` says where the rows are. See :meth:`Outputs.place`."""

    def one(y: Any) -> Any:
        if not isinstance(y, Tensor):
            return y
        place = outputs.place(y, members, rows, batch_dim) if dim is None else stated(y, dim, members)
        return split_tensor(y, place, members)

    return tree_map(one, tree)


def stated(y: Tensor, dim: int, members: int) -> int:
    """A dimension that the caller names.

    Raises:
        ConfigError: it does not exist, or the members do not divide it.
    """
    if not -y.ndim <= dim < y.ndim or y.shape[dim] % members:
        raise ConfigError(
            f"dim (={dim}) must be a dimension of {tuple(y.shape)} whose size is a multiple of the number of members "
            f"(={members})"
        )
    return dim % y.ndim
