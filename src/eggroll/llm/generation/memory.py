"""Keys and values of conversations, kept from one turn to the next, so that only new tokens are read.

Rows stop at different steps of a turn and get messages of different lengths, so that caches cannot be put side by
side as they are. What is kept of a row is therefore put in place anew, column by column, when a turn begins:

    row i:   [padding][known: from the last turn's cache        ][read now: the last N tokens]
    columns  0 ... W - len_i                                W - N                            W

``W`` is the longest row, and ``N`` the most tokens that any row has new. Every row then has exactly the layout, the
mask and the positions that it would have if all of it were read anew: padding on the left and no gap. Rows with fewer
new tokens than ``N`` read some known ones again, in columns that would be padding otherwise.

A row's tokens are compared with those that were kept. Where a template has rewritten an earlier turn, or a beginning
was cut off, what follows is read anew: what is kept can make a turn faster, never different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eggroll.llm.generation.prefix import plain_cache


@dataclass
class _Piece:
    """Layers' keys and values ``(rows, heads, columns, head size)`` of rows that stopped together."""

    layers: list[Any]


@dataclass(frozen=True)
class _Place:
    """Where a row is kept: in which piece, at which index; its first column there, and the tokens from there on."""

    piece: int
    index: int
    begin: int
    ids: list[int]


class Memory:
    """What :func:`~eggroll.llm.generation.generate.generate` keeps of rows, to go on with some of them.

    Set ``rows`` before each call: a name for each row of the batch, the same one in every turn.

    Args:
        model: whose keys and values they are.
    """

    def __init__(self, model: Any) -> None:
        self.rows: Sequence[int] = ()
        self.model = model
        self.read = 0
        """Columns of tokens that were read, times rows, over all turns."""
        self._pieces: list[_Piece] = []
        self._places: dict[int, _Place] = {}

    @staticmethod
    def of(model: Any) -> Memory | None:
        """A memory for a model, or ``None`` where each turn has to be read anew.

        That is so for recurrent states, which cannot be taken back to where a row stopped, for windows, which have
        forgotten what stands before them, and for encoders.
        """
        config = model.config
        encoder = bool(getattr(config, "is_encoder_decoder", False))
        state = getattr(model, "cache_has_rows", False) or getattr(model, "_is_stateful", False)
        return None if encoder or state or plain_cache(model) is None else Memory(model)

    def recall(self, ids: Tensor, mask: Tensor) -> tuple[Any, int]:
        """The cache of the columns that are known, and how many these are; ``None`` and 0 without any.

        Args:
            ids: ``(R, W)`` whole conversations, padded on the left.
            mask: ``(R, W)``, 0 for padding.
        """
        width = ids.shape[1]
        lengths = mask.sum(-1).tolist()
        new = width
        if self._places and all(row in self._places for row in self.rows):
            new = max(
                length - min(_common(self._places[row].ids, line[width - length :]), length - 1)
                for row, length, line in zip(self.rows, lengths, ids.tolist(), strict=True)
            )
        known = width - new
        self.read += new * len(ids)
        cache = self._placed(known, [width - length for length in lengths], ids.device) if known > 0 else None
        self._pieces, self._places = [], {}
        return cache, known

    def _placed(self, known: int, padding: Sequence[int], device: Any) -> Any:
        cache = plain_cache(self.model)
        groups: list[tuple[Tensor, Tensor, Tensor]] = []
        for number in range(len(self._pieces)):
            here = [i for i, row in enumerate(self.rows) if self._places[row].piece == number]
            index = torch.tensor([self._places[self.rows[i]].index for i in here], device=device, dtype=torch.long)
            # where the token of a row's column stood; what stands in padding does not matter
            shift = torch.tensor([self._places[self.rows[i]].begin - padding[i] for i in here], device=device)
            columns = torch.arange(known, device=device) + shift.unsqueeze(1).to(torch.long)
            groups.append((torch.tensor(here, device=device, dtype=torch.long), index, columns.clamp_min(0)))
        for depth, layer in enumerate(cache.layers):
            made = [
                each.new_empty((len(self.rows), each.shape[1], known, each.shape[-1]))
                for each in self._pieces[0].layers[depth]
            ]
            for piece, (rows, index, columns) in zip(self._pieces, groups, strict=True):
                for target, source in zip(made, piece.layers[depth], strict=True):
                    inside = columns.clamp_max(source.shape[2] - 1)
                    target[rows] = source.transpose(1, 2)[index.unsqueeze(1), inside].transpose(1, 2)
                piece.layers[depth] = None  # one layer at a time stands there twice
            layer.update(*made)
        return cache

    def keep(
        self, cache: Any, kept: Tensor | None, rows: Tensor, ids: Tensor, mask: Tensor, made: list[Tensor]
    ) -> None:
        """Keep rows that are done with for this turn.

        Args:
            cache: of the rows that are computed, with ``columns`` columns.
            kept: ``(k,)`` which of these to keep; ``None`` keeps all of them, and the cache is not used any more.
            rows: ``(k,)`` their numbers in the batch.
            ids: ``(R, W)`` what the batch began with.
            mask: ``(R, W)``, 0 for padding.
            made: of each of the kept rows the tokens that it wrote and that the cache has.
        """
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if kept is not None:
            layers = [(keys[kept], values[kept]) for keys, values in layers]
        number = len(self._pieces)
        self._pieces.append(_Piece(list(layers)))
        begins = (ids.shape[1] - mask[rows].sum(-1)).tolist()
        for index, (row, begin) in enumerate(zip(rows.tolist(), begins, strict=True)):
            tokens = ids[row, begin:].tolist() + made[index].tolist()
            self._places[self.rows[row]] = _Place(number, index, begin, tokens)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    return next(index for index in range(shorter) if one[index] != other[index])


__all__ = ["Memory"]
