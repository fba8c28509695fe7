"""What calls of compiled libraries need to know about PyTorch: who is watching, and where its threads are."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch.autograd import forward_ad


def is_unobserved() -> bool:
    """Whether nothing follows what is computed: no compilation, transform, dispatch mode, trace or dual level."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


@functools.cache
def thread_entry() -> int | None:
    """The address of the function that runs work on PyTorch's own threads, or None if it has no such."""
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
