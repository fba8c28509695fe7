"""A step of plain SGD in C, on CPUs: one pass over master, gradient and weights.

In plain PyTorch it is some ten passes (a copy for the size of the change, the gradient's sign, the sum, rounding, the
comparison with what the weights were), each through memory that the one before has pushed out of the cache.

The source (``step.c``) is compiled on first use. Weights are the same bits as PyTorch's; the size of the change is
summed in another order: blocks of 16,384 in float32, and these in float64.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from eggroll.torch.kernels import compile_c
from eggroll.torch.kernels.low_rank_c import VECTORS
from eggroll.torch.kernels.native import is_unobserved, thread_entry

SOURCE = Path(__file__).with_name("step.c")
FLAGS = ("-Wno-psabi", "-ffp-contract=fast")  # product and sum are rounded once, as PyTorch's addition with a factor
BLOCK = 16384
PARALLEL_FROM = 1 << 16
"""Entries from which a call is shared out to threads."""


def step_(master: Tensor, gradient: Tensor, weights: Tensor | None, rate: float) -> float | None:
    """``master += rate * gradient``, and ``weights`` rounded from it; the squared norm of the change.

    ``None`` if it was not done, and nothing is changed then.

    Args:
        master: float32, in place.
        gradient: float32, of the same shape.
        weights: bfloat16, of the same shape, written; ``None`` if the master is the weight itself.
        rate: the learning rate.
    """
    if not usable(master, gradient, weights) or isinstance(_entry(), str):
        return None
    squares = torch.empty(-(-master.numel() // BLOCK), dtype=torch.float64)
    _call(master, gradient, weights, squares, rate)
    return float(squares.sum())


def is_rounded(master: Tensor, weights: Tensor) -> bool | None:
    """Whether weights (bfloat16) are their master (float32), rounded; ``None`` if it was not looked at."""
    if not usable(master, master, weights) or isinstance(_entry(), str):
        return None
    return _call(master, None, weights, None, 0.0) == 0


def _call(master: Tensor, gradient: Tensor | None, weights: Tensor | None, squares: Tensor | None, rate: float) -> int:
    entry = _entry()
    assert not isinstance(entry, str)
    many = master.numel() >= PARALLEL_FROM and torch.get_num_threads() > 1
    others = (None if part is None else part.data_ptr() for part in (gradient, weights, squares))
    return int(entry(master.data_ptr(), *others, master.numel(), rate, thread_entry() if many else None))


def why_not() -> str | None:
    """Why the compiled library cannot be used here, or ``None``. The first call compiles it."""
    found = _entry()
    return found if isinstance(found, str) else None


def usable(master: Tensor, gradient: Tensor, weights: Tensor | None) -> bool:
    """Whether the tensors are what the C code reads: on a CPU, contiguous, of one shape, of the dtypes above."""
    parts = (master, gradient) if weights is None else (master, gradient, weights)
    plain = all(type(part) in (Tensor, torch.nn.Parameter) and part.is_cpu and part.is_contiguous() for part in parts)
    if not plain or any(part.shape != master.shape for part in parts) or not master.numel():
        return False
    types = (torch.float32, torch.float32, torch.bfloat16)
    return all(part.dtype == dtype for part, dtype in zip(parts, types, strict=False)) and is_unobserved()


@functools.cache
def _entry() -> ctypes._CFuncPtr | str:  # type: ignore[name-defined]
    """The function, or the reason why there is none."""
    source = VECTORS.read_text(encoding="utf-8") + SOURCE.read_text(encoding="utf-8")
    library = compile_c.load("step", source, FLAGS)
    if isinstance(library, str):
        return library
    run = library.eggroll_step
    run.argtypes = (*(ctypes.c_void_p,) * 4, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p)
    run.restype = ctypes.c_int64
    return run
