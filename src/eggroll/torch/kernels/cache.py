"""How large blocks of rows are: by the cache of the processor that runs, never by a constant from another one."""

from __future__ import annotations

import functools
from pathlib import Path

from eggroll._environment import BLOCK_MEGABYTES, value
from eggroll.errors import ConfigError

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
LEAST = 2**22
"""Smaller blocks lose more to calls than they gain: each call of a product packs its weight again."""
UNKNOWN = 2**24
"""Where the system does not tell."""


@functools.cache
def block_bytes() -> int:
    """Bytes of a block: half of the last-level cache, at least 4 MiB; ``EGGROLL_BLOCK_MB`` overrides it.

    Half, because the weight and the threads' other rows live there too. Results of the same rows in blocks of another
    size may differ in the last bit, where the product's library takes another path for another number of rows.

    Raises:
        ConfigError: ``EGGROLL_BLOCK_MB`` is not a whole number of at least 1.
    """
    given = value(BLOCK_MEGABYTES)
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise ConfigError(
                f"{BLOCK_MEGABYTES} (={given!r}) must be a whole number of MiB, at least 1; unset it for half of the "
                "last-level cache"
            )
        return int(given) * 2**20
    last = last_level_cache()
    return UNKNOWN if last is None else max(LEAST, last // 2)


def last_level_cache(caches: Path = CACHES) -> int | None:
    """Bytes of the largest data cache that the first core has, ``None`` where Linux does not tell."""
    sizes = []
    for index in sorted(caches.glob("index*")):
        try:
            size, kind = (index / "size").read_text().strip(), (index / "type").read_text().strip()
        except OSError:
            continue
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1:], 0)
        if unit and size[:-1].isdecimal() and kind != "Instruction":
            sizes.append(int(size[:-1]) * unit)
    return max(sizes, default=None)
