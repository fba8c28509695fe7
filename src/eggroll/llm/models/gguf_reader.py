"""Parsing GGUF files once and fast, for us and for transformers.

gguf's reader makes several views of a memory map for each string of a vocabulary, which takes seconds, and transformers
asks it for the same file again for the configuration and for the tokenizer.
"""

from __future__ import annotations

import copy
import functools
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eggroll._optional import require

_ALONE = threading.RLock()
"""Held while names of the libraries are replaced, so that they are put back in the right order."""


@contextmanager
def parsed_once() -> Iterator[None]:
    """Within the block, ``gguf.GGUFReader`` and transformers' ``load_gguf_checkpoint`` parse each file once.

    What they return is as before. A file that changes (size or time) is parsed again, tensors are not kept. gguf's
    table of names, which transformers asks for again for each module, is made once for an architecture. One thread at
    a time is in such a block.

    Raises:
        MissingExtraError: gguf or transformers are not installed.
    """
    gguf: Any = require("gguf", extra="llm")
    names: Any = require("transformers.modeling_gguf_pytorch_utils", extra="llm")
    readers: dict[Any, Any] = {}
    checkpoints: dict[Any, Any] = {}
    with _ALONE:
        slow, parse, table = gguf.GGUFReader, names.load_gguf_checkpoint, gguf.get_tensor_name_map
        fast = _fast(slow) if isinstance(slow, type) else slow  # in a block in a block, the outer one's

        def read(path: Any, mode: str = "r") -> Any:
            if mode != "r":
                return slow(path, mode)
            key = _identity(path)
            if key not in readers:
                readers[key] = fast(path)
            return readers[key]

        def checkpoint(path: Any, return_tensors: bool = False, *rest: Any, **more: Any) -> Any:
            if return_tensors:
                return parse(path, return_tensors, *rest, **more)
            key = _identity(path)
            if key not in checkpoints:
                checkpoints[key] = parse(path, False, *rest, **more)
            return _copied(checkpoints[key])

        gguf.GGUFReader, names.load_gguf_checkpoint = read, checkpoint
        gguf.get_tensor_name_map = functools.cache(table)
        try:
            yield
        finally:
            gguf.GGUFReader, names.load_gguf_checkpoint, gguf.get_tensor_name_map = slow, parse, table


def _copied(value: Any) -> Any:
    """A deep copy of dictionaries and lists; of long lists without asking what each string is."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return list(value) if value and isinstance(value[0], str | int | float) else [_copied(entry) for entry in value]
    return copy.copy(value)


def _identity(path: Any) -> tuple[str, int, int]:
    about = Path(path).stat()
    return str(Path(path).resolve()), about.st_size, about.st_mtime_ns


@functools.cache
def _fast(reader: Any) -> Any:
    """The reader with another way through long arrays; it makes the same fields."""
    from gguf import GGUFValueType

    class FastReader(reader):  # type: ignore[misc]
        """gguf's reader."""

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            data = self.data.view(np.ndarray)  # without the memory map's bookkeeping for each slice
            item, count = struct.unpack_from("=IQ", data, orig_offs)
            start = offset = orig_offs + 12
            parts: list[Any] = [data[orig_offs : orig_offs + 4].view(np.uint32), data[orig_offs + 4 : start].view("u8")]
            kind = self.gguf_scalar_to_np.get(item)
            if item == GGUFValueType.STRING:
                length = struct.Struct("=Q").unpack_from
                for _ in range(count):
                    text = offset + 8
                    end = text + length(data, offset)[0] if text <= len(data) else text
                    if end > len(data):
                        raise ValueError(f"the file ends within an array of {count} strings")
                    parts.extend((data[offset:text].view(np.uint64), data[text:end]))
                    offset = end
                numbers = list(range(3, 3 + 2 * count, 2))
            elif kind is not None:
                offset = start + count * np.dtype(kind).itemsize
                parts.extend(data[start:offset].view(kind).reshape(-1, 1))
                numbers = list(range(2, 2 + count))
            else:  # arrays of arrays
                return super()._get_field_parts(orig_offs, raw_type)
            types = [GGUFValueType.ARRAY, GGUFValueType(item)] if count else [GGUFValueType.ARRAY]
            return offset - orig_offs, parts, numbers, types

    return FastReader
