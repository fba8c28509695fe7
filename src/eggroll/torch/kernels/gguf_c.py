"""GGUF blocks to floating point in C: one pass from bytes to numbers, on PyTorch's own threads.

In plain PyTorch it takes a pass over memory for each step (halves apart, shifted, cast, scaled, moved).
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from eggroll.torch.kernels import compile_c
from eggroll.torch.kernels.native import thread_entry

SOURCE = Path(__file__).with_name("gguf.c")
FLAGS = ("-Wno-psabi", "-ffp-contract=off")  # product and sum are rounded one by one, as plain operations do
KINDS = {
    "Q8_0": (0, 32, 34),
    "Q4_0": (1, 32, 18),
    "Q4_1": (2, 32, 20),
    "Q5_0": (3, 32, 22),
    "Q5_1": (4, 32, 24),
    "Q2_K": (5, 256, 84),
    "Q3_K": (6, 256, 110),
    "Q4_K": (7, 256, 144),
    "Q5_K": (8, 256, 176),
    "Q6_K": (9, 256, 210),
}
"""The number by which C knows a format, and weights and bytes of a block."""
PARALLEL_FROM = 1 << 16
"""Calls that make at least this many numbers are shared out to threads."""
_NAMES = {torch.float32: "eggroll_gguf_f32", torch.bfloat16: "eggroll_gguf_bf16"}


def unpack(blocks: Tensor, kind: str, dtype: torch.dtype, rows: slice | Tensor | None = None) -> Tensor | None:
    """Rows ``(k, n)`` of blocks ``(m, bytes)``, in order or by number; ``None`` where C cannot be used.

    Args:
        blocks: uint8, each row whole blocks.
        kind: of the blocks; other formats than those of :data:`KINDS` are not expanded.
        dtype: of the result: float32, or bfloat16 (rounded to nearest).
        rows: which ones; ``None`` for all.

    Raises:
        IndexError: a row that is not there.
    """
    if dtype not in _NAMES or kind not in KINDS or not blocks.is_cpu or not blocks.is_contiguous():
        return None
    entry = _entry(dtype)
    if isinstance(entry, str):
        return None
    first, numbers = 0, None
    if isinstance(rows, Tensor):
        numbers = rows.to(torch.int64).contiguous()
        if numbers.numel() and not (int(numbers.min()) >= 0 and int(numbers.max()) < blocks.shape[0]):
            raise IndexError("index out of range in self")
        count = numbers.numel()
    else:
        first, stop, _ = (slice(None) if rows is None else rows).indices(blocks.shape[0])
        count = max(0, stop - first)
    number, weights, size = KINDS[kind]
    groups = blocks.shape[1] // size
    out = torch.empty((count, weights * groups), dtype=dtype)
    threads = torch.get_num_threads()
    parts = 1 if out.numel() < PARALLEL_FROM or threads == 1 else min(count, 4 * threads)
    if out.numel():
        address = None if numbers is None else numbers.data_ptr()
        ways = thread_entry() if parts > 1 else None
        entry(out.data_ptr(), blocks.data_ptr(), address, first, count, groups, number, parts, ways)
    return out


def why_not(dtype: torch.dtype = torch.float32) -> str | None:
    """Why C cannot be used for a dtype here, or ``None``."""
    found = _entry(dtype)
    return found if isinstance(found, str) else None


@functools.cache
def _entry(dtype: torch.dtype) -> ctypes._CFuncPtr | str:  # type: ignore[name-defined]
    chosen = ("-DBF16",) if dtype == torch.bfloat16 else ()
    library = compile_c.load("gguf", SOURCE.read_text(encoding="utf-8"), (*FLAGS, *chosen))
    if isinstance(library, str):
        return library
    run = getattr(library, _NAMES[dtype])
    run.argtypes = (*(ctypes.c_void_p,) * 3, *(ctypes.c_int64,) * 5, ctypes.c_void_p)
    run.restype = None
    return run
