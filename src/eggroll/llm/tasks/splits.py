"""Splits that cannot overlap: a problem's own text says which split it belongs to.

    u = blake2b(key) / 2^64        key: what makes two problems the same one, see each task
    train | validation | heldout | test    by which part of [0, 1) holds u

Wherever a problem comes from, and however many are made, equal problems fall into the same split. No order, seed or
number of examples can put a problem that was trained on into the rows that figures are reported on.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["SHARES", "SPLITS", "Splits", "fill", "normal", "split_of"]

Row = dict[str, Any]
Splits = dict[str, list[Row]]
SPLITS = ("train", "validation", "heldout", "test")
SHARES: Mapping[str, float] = {"train": 0.5, "validation": 0.125, "heldout": 0.125, "test": 0.25}
"""Parts of [0, 1), in this order, for problems that a generator makes."""


def split_of(key: str, shares: Mapping[str, float] = SHARES) -> str:
    """The split of a problem.

    Args:
        key: the same for equal problems.
        shares: split to its part of all problems; the parts sum to 1.
    """
    uniform = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64
    for name, share in shares.items():
        uniform -= share
        if uniform < 0:
            return name
    return name


def normal(text: str) -> str:
    """A key for problems that are texts: case, white space and Unicode's variants of a character do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def fill(problems: Iterable[tuple[str, Row]], sizes: Mapping[str, int], shares: Mapping[str, float] = SHARES) -> Splits:
    """Take problems, each once, until every split has its size or there are no more.

    The problems of a split come in the order in which they were made, so a smaller size gives a prefix.

    Args:
        problems: pairs of a key and a row.
        sizes: split to the number of rows that it takes at most.
        shares: see :func:`split_of`.

    Returns:
        All four splits, some of them possibly short or empty.
    """
    found: Splits = {name: [] for name in SPLITS}
    seen: set[str] = set()
    missing = sum(sizes.values())
    for key, row in problems:
        name = split_of(key, shares)
        if key in seen or len(found[name]) >= sizes.get(name, 0):
            continue
        seen.add(key)
        found[name].append(row)
        missing -= 1
        if missing == 0:
            break
    return found
