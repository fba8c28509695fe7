"""The low-rank term of a product in C: ``out += (x b) a^T`` in one pass over the rows, on CPUs.

In decoding a product has one or a few rows per member, and the three or four launches that the term takes in eager
PyTorch cost as much as its arithmetic ten times over. Here it is one call. Sums are made in float32 also for bfloat16,
and a result is rounded once, so it is closer to the exact one than what plain operations give.

Large calls share rows out to threads: to those that PyTorch itself keeps for its products (``GOMP_parallel``, found
through its library), as a second set of threads would fight with them over the cores.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from eggroll.torch.kernels import compile_c

# Sums in any order, so that they can be vectors. Not -ffast-math: it would also drop infinities and NaN, and change how
# the whole process treats denormal numbers.
FLAGS = ("-fassociative-math", "-fno-signed-zeros", "-ffp-contract=fast")
MAX_RANK = 8
PARALLEL_FROM = 1 << 17
"""Calls of at least this many multiply-adds are shared out to threads."""
MAX_COLUMNS_BF16 = 64
"""In bfloat16, a member's rows times a rank above 1, beyond which a batched product (with its tiles) is faster."""

_SOURCE = """
#include <stdint.h>

typedef void parallel_t(void (*)(void *), void *, unsigned, unsigned);
typedef struct {
    void *out; const void *x, *a, *b; const int64_t *ids;
    int64_t rows, per_member, n, m, rank, step, next;
} job_t;

static inline float load_f32(float value) { return value; }
static inline float store_f32(float value) { return value; }
static inline float load_bf16(uint16_t value) {
    union { uint32_t u; float f; } v; v.u = (uint32_t)value << 16;
    return v.f;
}
static inline uint16_t store_bf16(float value) {
    union { uint32_t u; float f; } v; v.f = value;
    uint32_t rounded = (v.u + 0x7FFFu + ((v.u >> 16) & 1u)) >> 16;
    return (uint16_t)((v.u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

#define ROW(NAME, TYPE, LOAD, STORE) \\
    static inline __attribute__((always_inline)) void NAME##_row( \\
        TYPE *restrict out, const TYPE *restrict x, const TYPE *restrict a, const TYPE *restrict b, \\
        const TYPE *restrict scales, int64_t n, int64_t m, const int64_t rank) { \\
        float s[@MAX_RANK@] = {0}; \\
        if (scales) { \\
            for (int64_t k = 0; k < rank; k++) s[k] = LOAD(scales[k]); \\
        } else if (rank == 1) { \\
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0; \\
            int64_t i = 0; \\
            for (; i + 64 <= n; i += 64) \\
                for (int64_t j = i; j < i + 16; j++) { \\
                    s0 += LOAD(x[j]) * LOAD(b[j]); s1 += LOAD(x[j + 16]) * LOAD(b[j + 16]); \\
                    s2 += LOAD(x[j + 32]) * LOAD(b[j + 32]); s3 += LOAD(x[j + 48]) * LOAD(b[j + 48]); \\
                } \\
            for (; i < n; i++) s0 += LOAD(x[i]) * LOAD(b[i]); \\
            s[0] = (s0 + s1) + (s2 + s3); \\
        } else { \\
            for (int64_t i = 0; i < n; i++) \\
                for (int64_t k = 0; k < rank; k++) s[k] += LOAD(x[i]) * LOAD(b[i * rank + k]); \\
        } \\
        for (int64_t j = 0; j < m; j++) { \\
            float sum = LOAD(out[j]); \\
            for (int64_t k = 0; k < rank; k++) sum += s[k] * LOAD(a[j * rank + k]); \\
            out[j] = STORE(sum); \\
        } \\
    } \\
    static void NAME##_work(void *data) { \\
        job_t *job = data; \\
        const int64_t n = job->n, m = job->m, rank = job->rank; \\
        for (;;) { \\
            int64_t row = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED), end = row + job->step; \\
            if (row >= job->rows) return; \\
            if (end > job->rows) end = job->rows; \\
            for (; row < end; row++) { \\
                int64_t member = row / job->per_member; \\
                TYPE *out = (TYPE *)job->out + row * m; \\
                const TYPE *x = 0, *scales = 0, *b = 0, *a = (const TYPE *)job->a + member * m * rank; \\
                if (job->ids) \\
                    scales = (const TYPE *)job->b + (member * n + job->ids[row]) * rank; \\
                else { \\
                    x = (const TYPE *)job->x + row * n; \\
                    b = (const TYPE *)job->b + member * n * rank; \\
                } \\
                switch (rank) { \\
                    case 1: NAME##_row(out, x, a, b, scales, n, m, 1); break; \\
                    case 2: NAME##_row(out, x, a, b, scales, n, m, 2); break; \\
                    case 4: NAME##_row(out, x, a, b, scales, n, m, 4); break; \\
                    case 8: NAME##_row(out, x, a, b, scales, n, m, 8); break; \\
                    default: NAME##_row(out, x, a, b, scales, n, m, rank); \\
                } \\
            } \\
        } \\
    } \\
    void eggroll_##NAME(void *out, const void *x, const void *a, const void *b, const int64_t *ids, int64_t rows, \\
                        int64_t per_member, int64_t n, int64_t m, int64_t rank, int64_t parts, parallel_t *share) { \\
        job_t job = {out, x, a, b, ids, rows, per_member, n, m, rank, (rows + parts - 1) / parts, 0}; \\
        if (parts > 1) share(NAME##_work, &job, 0, 0); \\
        else NAME##_work(&job); \\
    }

ROW(f32, float, load_f32, store_f32)
ROW(bf16, uint16_t, load_bf16, store_bf16)
"""

_NAMES = {torch.float32: "eggroll_f32", torch.bfloat16: "eggroll_bf16"}


def add_(out_Rm: Tensor, x_Rn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor) -> bool:
    """``out += (x b) a^T`` for rows ``(P * batch, ...)``, member by member; False if it was not done.

    ``out`` and ``x`` may have more dimensions between the rows and the features.
    """
    rank = a_Pmr.shape[2]
    if rank > MAX_RANK or x_Rn.dtype != out_Rm.dtype or not _is_plain(x_Rn) or not _usable(out_Rm, a_Pmr, b_Pnr):
        return False
    members, m, n = a_Pmr.shape[0], a_Pmr.shape[1], b_Pnr.shape[1]
    if rank > 1 and x_Rn.dtype == torch.bfloat16 and x_Rn.numel() * rank > MAX_COLUMNS_BF16 * members * n:
        return False
    return _call(out_Rm, x_Rn.data_ptr(), a_Pmr.data_ptr(), b_Pnr.data_ptr(), None, members, n, m, rank, n + m)


def add_gathered_(out_Rd: Tensor, ids_R: Tensor, a_PVr: Tensor, b_Pdr: Tensor) -> bool:
    """``out += a[ids] b^T``, likewise. The ids have to be valid, which gathering the base from them checked."""
    rank = a_PVr.shape[2]
    if rank > MAX_RANK or ids_R.dtype != torch.long or not _is_plain(ids_R) or not _usable(out_Rd, a_PVr, b_Pdr):
        return False
    members, vocabulary, d = a_PVr.shape[0], a_PVr.shape[1], b_Pdr.shape[1]
    a, b = a_PVr.data_ptr(), b_Pdr.data_ptr()
    return _call(out_Rd, None, b, a, ids_R.data_ptr(), members, vocabulary, d, rank, d)


def why_not() -> str | None:
    """Why the compiled library cannot be used here, or None. The first call compiles it."""
    found = _library()
    return found if isinstance(found, str) else None


def source() -> str:
    """The C source."""
    return _SOURCE.replace("@MAX_RANK@", str(MAX_RANK))


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is nothing but numbers that lie one after the other in the memory of the CPU."""
    return type(x) is Tensor and x.is_cpu and x.is_contiguous()


def _usable(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether nobody but the result needs to know of the call: no autograd, tracing, batching or dispatch mode."""
    dtype = out.dtype
    return (
        dtype in _NAMES
        and a.dtype == dtype == b.dtype
        and _is_plain(out)
        and _is_plain(a)
        and _is_plain(b)
        and not out.requires_grad
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
        and not isinstance(_library(), str)
    )


def _call(
    out: Tensor, x: int | None, a: int, b: int, ids: int | None, members: int, n: int, m: int, rank: int, width: int
) -> bool:
    entries = _library()
    assert not isinstance(entries, str)
    rows = out.numel() // m if m else 0
    parts = 1
    if rows * width * rank >= PARALLEL_FROM and entries.parallel:
        threads = torch.get_num_threads()
        parts = 1 if threads == 1 else min(rows, 4 * threads)
    if rows:
        entry = entries.f32 if out.dtype == torch.float32 else entries.bf16
        entry(out.data_ptr(), x, a, b, ids, rows, rows // members, n, m, rank, parts, entries.parallel)
    return True


class _Entries:
    """The functions of the loaded library, and PyTorch's way into its threads (None if it has no such)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.f32, self.bf16 = library.eggroll_f32, library.eggroll_bf16
        for entry in (self.f32, self.bf16):
            entry.argtypes = (*(ctypes.c_void_p,) * 5, *(ctypes.c_int64,) * 6, ctypes.c_void_p)
            entry.restype = None
        self.parallel = _parallel()


def _parallel() -> int | None:
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@functools.cache
def _library() -> _Entries | str:
    """The functions, or the reason why there are none."""
    library = compile_c.load("low_rank", source(), FLAGS)
    return library if isinstance(library, str) else _Entries(library)
