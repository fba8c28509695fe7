"""What tells a data set from one that was changed: a digest of its rows, wherever they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from eggroll.lifecycle.sources import digest_of
from eggroll.llm.data.examples import Example


def data_fingerprint(examples: Sequence[Example]) -> str:
    """The number of rows, and a digest of everything in them."""
    return f"{len(examples)} row{'' if len(examples) == 1 else 's'}, {digest_of(_rows(examples))}"


def _rows(examples: Sequence[Example]) -> Iterator[bytes]:
    for example in examples:
        yield json.dumps([example.prompt, example.text, example.columns], default=_plain).encode()


def _plain(value: Any) -> Any:
    """What JSON does not know: dates, arrays, images, bytes."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tobytes"):
        value = value.tobytes()
    if isinstance(value, bytes | bytearray):
        return hashlib.sha256(value).hexdigest()
    return str(value) if isinstance(value, int | float | complex) else type(value).__name__
