"""Threefry and normals in C, compiled on first use with the machine's C compiler: for CPUs, as fast as they go.

The source below compiles in a tenth of a second (:mod:`eggroll.torch.kernels.compile_c`), where torch.compile takes
half a minute for the same loop (and then runs at half the speed). The floats are those of ``threefry_eager``, bit for
bit (``core/normal.py`` says why); that is checked on loading.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.core import normal as spec
from eggroll.torch.kernels import compile_c, threefry_eager

FLAGS = ("-ffp-contract=off",)
"""No fused multiply-add, so that every compiler rounds alike."""
MIN_PER_THREAD = 1 << 17
CAST_BLOCK = 1 << 20

_SOURCE = """
#include <stdint.h>

#define ROUND(r) x0 += x1; x1 = (x1 << r) | (x1 >> (32 - r)); x1 ^= x0;
#define FOUR(a, b, c, d, i0, i1) ROUND(a) ROUND(b) ROUND(c) ROUND(d) x0 += i0; x1 += i1;

static inline uint32_t cipher(uint32_t k0, uint32_t k1, uint32_t hi, uint32_t lo) {
    uint32_t k2 = k0 ^ k1 ^ 0x1BD11BDAu, x0 = hi + k0, x1 = lo + k1;
    FOUR(13, 15, 26, 6, k1, k2 + 1)
    FOUR(17, 29, 16, 24, k2, k0 + 2)
    FOUR(13, 15, 26, 6, k0, k1 + 3)
    FOUR(17, 29, 16, 24, k1, k2 + 4)
    FOUR(13, 15, 26, 6, k2, k0 + 5)
    return x0 ^ x1;
}

static inline float as_float(uint32_t bits) { union { uint32_t u; float f; } v; v.u = bits; return v.f; }
static inline uint32_t as_bits(float value) { union { uint32_t u; float f; } v; v.f = value; return v.u; }

static const float CENTER[9] = {@CENTER@}, TAIL[9] = {@TAIL@};

static inline float normal(uint32_t bits) {
    float x = (float)((int32_t)(bits ^ 0x80000000u) >> 9) * 0x1p-22f + 0x1p-24f;
    float s = 1.0f - x * x;
    int32_t e = ((int32_t)as_bits(s) - @SQRT_HALF_BITS@) >> 23;
    float m = as_float(as_bits(s) - ((uint32_t)e << 23));
    float g = (m - 1.0f) / (m + 1.0f), h = g * g;
    float w = ((@LOG0@ * h + @LOG1@) * h + @LOG2@) * g + (float)e * @MINUS_LN_2@;
    float zc = w - 2.5f, zt = __builtin_sqrtf(w) - 3.0f, rc = CENTER[0], rt = TAIL[0];
    for (int i = 1; i < 9; i++) { rc = rc * zc + CENTER[i]; rt = rt * zt + TAIL[i]; }
    return (w < @TAIL_FROM@ ? rc : rt) * x * @SQRT_2@;
}

/* Elements begin to end of the (K, count) result, row after row; element i of a row has the counter start + i.
   out is where element begin goes. */
#define FILL(NAME, TYPE, VALUE) \\
    void NAME(const uint32_t *keys, uint64_t start, int64_t count, int64_t begin, int64_t end, TYPE *restrict out) { \\
        while (begin < end) { \\
            int64_t row = begin / count, column = begin - row * count, length = count - column; \\
            uint64_t counter = start + (uint64_t)column; \\
            int64_t same_hi = (int64_t)(0x100000000u - (counter & 0xFFFFFFFFu)); \\
            uint32_t k0 = keys[2 * row], k1 = keys[2 * row + 1]; \\
            uint32_t hi = (uint32_t)(counter >> 32), lo = (uint32_t)counter; \\
            if (length > end - begin) length = end - begin; \\
            if (length > same_hi) length = same_hi; \\
            for (int64_t i = 0; i < length; i++) { \\
                uint32_t bits = cipher(k0, k1, hi, lo + (uint32_t)i); \\
                out[i] = VALUE; \\
            } \\
            begin += length; \\
            out += length; \\
        } \\
    }

FILL(eggroll_bits, uint32_t, bits)
FILL(eggroll_normals, float, normal(bits))
"""


def fill_bits(out: Tensor, keys: NDArray[np.uint32], start: int) -> None:
    """As ``threefry_eager.fill_bits``; ``out`` is a contiguous int32 tensor on the CPU. Needs ``why_not() is None``."""
    _fill("eggroll_bits", out.view(-1), keys, start, out.shape[1], 0)


def fill_normals(out: Tensor, keys: NDArray[np.uint32], start: int) -> None:
    """As ``threefry_eager.fill_normals``; ``out`` is contiguous and on the CPU. Needs ``why_not() is None``."""
    flat, count = out.view(-1), out.shape[1]
    if out.dtype == torch.float32:
        _fill("eggroll_normals", flat, keys, start, count, 0)
        return
    buffer = torch.empty(min(CAST_BLOCK, flat.numel()), dtype=torch.float32, device="cpu")
    for begin in range(0, flat.numel(), CAST_BLOCK):
        target = flat[begin : begin + CAST_BLOCK]
        _fill("eggroll_normals", buffer[: target.numel()], keys, start, count, begin)
        target.copy_(buffer[: target.numel()])


def why_not() -> str | None:
    """Why the compiled library cannot be used here, or None. The first call compiles it."""
    library = _library()
    return library if isinstance(library, str) else None


def source() -> str:
    """The C source, with the numbers of the specification put in as hexadecimal floats, which are exact."""

    def literal(value: float) -> str:
        return f"{value.hex()}f"

    text = _SOURCE
    for name, value in {
        "CENTER": ", ".join(map(literal, spec.CENTER)),
        "TAIL": ", ".join(map(literal, spec.TAIL)),
        "LOG0": literal(spec.LOG[0]),
        "LOG1": literal(spec.LOG[1]),
        "LOG2": literal(spec.LOG[2]),
        "MINUS_LN_2": literal(spec.MINUS_LN_2),
        "SQRT_2": literal(spec.SQRT_2),
        "TAIL_FROM": literal(spec.TAIL_FROM),
        "SQRT_HALF_BITS": hex(spec.SQRT_HALF_BITS),
    }.items():
        text = text.replace(f"@{name}@", value)
    return text


def _fill(function: str, flat: Tensor, keys: NDArray[np.uint32], start: int, count: int, first: int) -> None:
    """Elements ``first`` to ``first + len(flat)`` of the ``(K, count)`` result, shared out to threads."""
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    keys = np.ascontiguousarray(keys)
    size = flat.numel()

    def part(begin: int, end: int) -> None:
        # ctypes releases the interpreter's lock for the length of the call, so plain threads run side by side.
        getattr(library, function)(
            keys.ctypes.data, start, count, first + begin, first + end, flat.data_ptr() + begin * flat.element_size()
        )

    num_parts = max(1, min(torch.get_num_threads(), size // MIN_PER_THREAD))
    bounds = [size * index // num_parts for index in range(num_parts + 1)]
    others = [threading.Thread(target=part, args=pair) for pair in itertools.pairwise(bounds[1:])]
    for thread in others:
        thread.start()
    part(*bounds[:2])
    for thread in others:
        thread.join()


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none."""
    library = compile_c.load("threefry", source(), FLAGS)
    if isinstance(library, str):
        return library
    for name in ("eggroll_bits", "eggroll_normals"):
        entry = getattr(library, name)
        entry.argtypes = (ctypes.c_void_p, ctypes.c_uint64, *(ctypes.c_int64,) * 3, ctypes.c_void_p)
        entry.restype = None
    if not _agrees(library):
        return f"the library made by {' '.join(compile_c.compiler_command())} rounds differently"
    return library


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library gives the floats of the eager version: a compiler that fuses or reorders would not."""
    keys, start, count = np.array([[1, 2], [0xFFFFFFFF, 3]], np.uint32), (1 << 32) - 1000, 4096
    expected, got = torch.empty(2, count, device="cpu"), torch.empty(2, count, device="cpu")
    threefry_eager.fill_normals(expected, keys, start)
    library.eggroll_normals(keys.ctypes.data, start, count, 0, 2 * count, got.data_ptr())
    return torch.equal(expected, got)
