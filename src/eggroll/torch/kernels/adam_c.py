"""A step of Adam in C, on CPUs: one pass for the moments, PyTorch's square root, one pass for the rest.

``torch.optim.Adam`` makes some twelve passes, each through memory that the one before has pushed out of the cache. The
bits are the same: the source (``adam.c``) follows PyTorch's operations one by one, with the square root left to
PyTorch, which on many machines does not round it exactly. That they are the same is tried out once in each process, as
PyTorch adds products in one rounding on some processors and in two on others; where they are not, PyTorch steps.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.torch.kernels import compile_c
from eggroll.torch.kernels.low_rank_c import VECTORS
from eggroll.torch.kernels.native import thread_entry
from eggroll.torch.kernels.step_c import BLOCK, PARALLEL_FROM, usable

SOURCE = Path(__file__).with_name("adam.c")
FLAGS = ("-Wno-psabi", "-ffp-contract=off")
TRIAL = 4099
"""Numbers that are compared with PyTorch's; odd, so that the ends of vectors are among them."""


def step_(
    master: Tensor,
    gradient: Tensor,
    weights: Tensor | None,
    state: MutableMapping[str, Any],
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> float | None:
    """One step that maximizes, without weight decay; the squared norm of the change.

    ``None`` if it was not done, and nothing is changed then.

    Args:
        master: float32, in place.
        gradient: float32, of the same shape.
        weights: bfloat16, of the same shape, written; ``None`` if the master is the weight itself.
        state: PyTorch's, after its first step: ``step``, ``exp_avg`` and ``exp_avg_sq``, in place.
        rate: the learning rate.
        betas, eps: Adam's.
    """
    parts = (state["exp_avg"], state["exp_avg_sq"])
    if not usable(master, gradient, weights) or not all(usable(part, part, None) for part in parts):
        return None
    if betas[0] <= 0.5 or any(part.shape != master.shape for part in parts) or not _agrees():  # lerp has two forms
        return None
    return _step(master, gradient, weights, state, rate, betas, eps)


def _step(
    master: Tensor,
    gradient: Tensor,
    weights: Tensor | None,
    state: MutableMapping[str, Any],
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> float:
    entry = _entry()
    assert not isinstance(entry, str)
    first, second = state["exp_avg"], state["exp_avg_sq"]
    state["step"] += 1
    step = float(state["step"])
    share = thread_entry() if master.numel() >= PARALLEL_FROM and torch.get_num_threads() > 1 else None
    squares = torch.empty(-(-master.numel() // BLOCK), dtype=torch.float64)
    correction, size = (1 - betas[1] ** step) ** 0.5, rate / (1 - betas[0] ** step)
    numbers = (master.numel(), 1 - betas[0], betas[1], 1 - betas[1], correction, eps, -size)
    pointers = (first.data_ptr(), second.data_ptr(), gradient.data_ptr())
    rest = (master.data_ptr(), None if weights is None else weights.data_ptr(), squares.data_ptr())
    entry(*pointers, None, *rest, *numbers, share)
    root = second.sqrt()
    entry(*pointers, root.data_ptr(), *rest, *numbers, share)
    return float(squares.sum())


def why_not() -> str | None:
    """Why steps are left to PyTorch here, or ``None``. The first call compiles the library and tries it."""
    found = _entry()
    if isinstance(found, str):
        return found
    return None if _agrees() else "PyTorch's Adam rounds otherwise on this machine"


@functools.cache
def _agrees() -> bool:
    """Whether three steps have the bits of ``torch.optim.Adam``."""
    if isinstance(_entry(), str):
        return False
    make = torch.Generator().manual_seed(0)
    ours = torch.randn(TRIAL, generator=make)
    theirs = nn.Parameter(ours.clone(), requires_grad=False)
    optimizer = torch.optim.Adam([theirs], lr=0.01, maximize=True)
    state: dict[str, Any] = {}
    for turn in range(3):
        gradient = torch.randn(TRIAL, generator=make)
        if turn:
            _step(ours, gradient, None, state, 0.01, (0.9, 0.999), 1e-8)
        theirs.grad = gradient
        optimizer.step()
        if not turn:
            ours.copy_(theirs)
            state = {name: value.clone() for name, value in optimizer.state[theirs].items()}
    return torch.equal(ours, theirs)


@functools.cache
def _entry() -> ctypes._CFuncPtr | str:  # type: ignore[name-defined]
    """The function, or the reason why there is none."""
    source = VECTORS.read_text(encoding="utf-8") + SOURCE.read_text(encoding="utf-8")
    library = compile_c.load("adam", source, FLAGS)
    if isinstance(library, str):
        return library
    run = library.eggroll_adam
    run.argtypes = (*(ctypes.c_void_p,) * 7, ctypes.c_int64, *(ctypes.c_float,) * 6, ctypes.c_void_p)
    run.restype = None
    return run
