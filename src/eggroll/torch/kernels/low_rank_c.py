"""The low-rank term of a product in C: ``out += (x b) a^T`` in one pass over the rows, on CPUs.

In decoding a product has one or a few rows per member, and the three or four launches that the term takes in eager
PyTorch cost as much as its arithmetic ten times over. Here it is one call. Sums are made in float32 also for bfloat16,
and a result is rounded once, so it is closer to the exact one than what plain operations give.

The source (``low_rank.c``) is compiled on first use, half a second for each dtype that is used.

Large calls share rows out to threads: to those that PyTorch itself keeps for its products (``GOMP_parallel``, found
through its library), as a second set of threads would fight with them over the cores.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from eggroll.torch.kernels import compile_c
from eggroll.torch.kernels.native import is_unobserved, thread_entry
from eggroll.torch.quantized.tensor import QuantizedTensor

SOURCE, VECTORS = (Path(__file__).with_name(name) for name in ("low_rank.c", "vectors.h"))
# Sums in any order, so that they can be vectors. Not -ffast-math: it would also drop infinities and NaN, and change how
# the whole process treats denormal numbers. The source spells its vectors out, so -O3 would only take longer.
FLAGS = ("-O2", "-Wno-psabi", "-fassociative-math", "-fno-signed-zeros", "-ffp-contract=fast")
MAX_RANK = 16
PARALLEL_FROM = 1 << 17
"""Calls of at least this many multiply-adds are shared out to threads."""
MAX_COLUMNS_BF16 = 64
"""In bfloat16, a member's rows times a rank above 1, beyond which a batched product (with its tiles) is faster."""

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NAMES = {torch.float32: "eggroll_f32", torch.bfloat16: "eggroll_bf16"}


def add_(out_Rm: Tensor, x_Rn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias: Tensor | None = None) -> bool:
    """``out += (x b) a^T + bias`` for rows ``(P * batch, ...)``, member by member; False if it was not done.

    ``out`` and ``x`` may have more dimensions between the rows and the features. ``bias`` is ``(m,)``, or ``(P, m)``.
    """
    if not can_add(x_Rn, a_Pmr, b_Pnr, bias) or out_Rm.dtype != x_Rn.dtype:
        return False
    if not _is_plain(out_Rm) or out_Rm.requires_grad:
        return False
    add_unchecked_(out_Rm, x_Rn, a_Pmr, b_Pnr, bias)
    return True


def can_add(x_Rn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias: Tensor | None = None, *others: Tensor) -> bool:
    """Whether :func:`add_unchecked_` may be called with these and an output of their kind.

    ``others`` are what else the output is made of: nobody may ask for their gradients either.
    """
    rank = a_Pmr.shape[2]
    if rank > MAX_RANK or not _is_plain(x_Rn) or not _usable(x_Rn, a_Pmr, b_Pnr, bias, *others):
        return False
    many = x_Rn.numel() * rank > MAX_COLUMNS_BF16 * a_Pmr.shape[0] * b_Pnr.shape[1]
    return not (rank > 1 and x_Rn.dtype == torch.bfloat16 and many)


def add_unchecked_(out_Rm: Tensor, x_Rn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias: Tensor | None = None) -> None:
    """As :func:`add_`, for what :func:`can_add` has allowed."""
    a, b = _rank_major(a_Pmr), _rank_major(b_Pnr)
    _call(out_Rm, a, b, x=x_Rn, bias=bias, width=a.shape[2] + b.shape[2])


class Term:
    """The term of one weight, looked at once: what a call of the library takes, apart from rows and bias.

    For products that are made over and over with the same factors, as in decoding, where what Python does before a call
    takes longer than the call. The factors must stay where they are in memory; :func:`prepare` makes these.
    """

    def __init__(self, entries: _Entries, a_Prm: Tensor, b_Prn: Tensor) -> None:
        self.a, self.b = a_Prm, b_Prn  # keeps the memory
        self.address_a, self.address_b, self.dtype = a_Prm.data_ptr(), b_Prn.data_ptr(), a_Prm.dtype
        (self.members, self.rank, self.m), self.n = a_Prm.shape, b_Prn.shape[2]
        self.width = (self.m + self.n) * self.rank
        self.limit = MAX_COLUMNS_BF16 * self.members // self.rank  # of rows
        if self.rank == 1 or self.dtype != torch.bfloat16:
            self.limit = 2**62
        self.run, self.ways = entries.run, entries.parallel

    def takes(self, x: Tensor, bias: Tensor | None) -> bool:
        """As :func:`can_add`, of contiguous rows ``x (R, ..., n)``; false also where somebody may ask for gradients."""
        if type(x) is not Tensor or x.dtype is not self.dtype or not x.is_cpu or not is_unobserved():
            return False
        rows = x.numel() // self.n
        if torch.is_grad_enabled() or rows > self.limit or rows % self.members or not rows:
            return False
        return bias is None or (
            type(bias) in _PLAIN_TYPES
            and bias.dtype is self.dtype
            and bias.is_cpu
            and bias.shape in ((self.m,), (self.members, self.m))
            and bias.is_contiguous()
        )

    def add_(self, out_Rm: Tensor, x_Rn: Tensor, bias: Tensor | None) -> None:
        """``out += (x b) a^T + bias`` for what :meth:`takes` has allowed."""
        rows = x_Rn.numel() // self.n
        shift, step = (None, 0) if bias is None else (bias.data_ptr(), self.m if bias.ndim > 1 else 0)
        parts = _parts(rows, rows * self.width) if self.ways else 1
        self.run(
            out_Rm.data_ptr(), None, x_Rn.data_ptr(), self.address_a, self.address_b, None, shift, None,
            rows, rows // self.members, self.n, self.m, self.rank, step, parts, self.ways,
        )  # fmt: skip


def prepare(weight_mn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor) -> Term | None:
    """The term of a weight, if the library can be used with it and its factors lie rank-major in memory.

    The weight itself is only looked at: it may be a quantized one.
    """
    if weight_mn.ndim != 2 or a_Pmr.ndim != 3 or b_Pnr.ndim != 3 or weight_mn.dtype not in _NAMES:
        return None
    if not weight_mn.is_cpu or type(weight_mn) not in (*_PLAIN_TYPES, QuantizedTensor):
        return None
    if not all(part.is_cpu and type(part) in _PLAIN_TYPES and part.dtype == weight_mn.dtype for part in (a_Pmr, b_Pnr)):
        return None
    (members, m, rank), n = a_Pmr.shape, b_Pnr.shape[1]
    if weight_mn.shape != (m, n) or b_Pnr.shape != (members, n, rank):
        return None
    if rank > MAX_RANK or 0 in (members, m, n, rank):
        return None
    a_Prm, b_Prn = a_Pmr.transpose(1, 2), b_Pnr.transpose(1, 2)
    if not (is_unobserved() and a_Prm.is_contiguous() and b_Prn.is_contiguous()):
        return None
    entries = _library(weight_mn.dtype)
    return None if isinstance(entries, str) else Term(entries, a_Prm.detach(), b_Prn.detach())


def add_shared(
    out_PRm: Tensor, base_Rm: Tensor, x_Rn: Tensor, a_Pmr: Tensor, b_Pnr: Tensor, bias: Tensor | None
) -> bool:
    """``out[p] = base + (x b_p) a_p^T + bias`` for an input that is the same for all members; False if not done.

    ``base`` is ``x W^T``, of shape ``(batch, m)``; ``out`` is ``(P, batch, m)``.
    """
    if a_Pmr.shape[2] > MAX_RANK or not (_is_plain(out_PRm) and _is_plain(base_Rm)):
        return False
    if not _usable(base_Rm, a_Pmr, b_Pnr, bias, x_Rn):
        return False
    a, b = _rank_major(a_Pmr), _rank_major(b_Pnr)
    scales_RPr = x_Rn @ b.view(-1, b.shape[2]).T  # one product for all members
    _call(out_PRm, a, b, base=base_Rm, scales=scales_RPr.contiguous(), bias=bias, width=a.shape[2])
    return True


def add_gathered_(out_Rd: Tensor, ids_R: Tensor, a_PVr: Tensor, b_Pdr: Tensor) -> bool:
    """``out += a[ids] b^T``, likewise. The ids have to be valid, which gathering the base from them checked."""
    if a_PVr.shape[2] > MAX_RANK or ids_R.dtype != torch.long or not _is_plain(ids_R) or not _is_plain(out_Rd):
        return False
    if out_Rd.requires_grad or not _usable(out_Rd, a_PVr, b_Pdr):
        return False
    vocabulary, d = _rank_major(a_PVr), _rank_major(b_Pdr)
    _call(out_Rd, d, vocabulary, ids=ids_R, width=d.shape[2])
    return True


def why_not(dtype: torch.dtype = torch.float32) -> str | None:
    """Why the compiled library for a dtype cannot be used here, or None. The first call compiles it."""
    found = _library(dtype)
    return found if isinstance(found, str) else None


def source() -> str:
    """The C source."""
    whole = VECTORS.read_text(encoding="utf-8") + SOURCE.read_text(encoding="utf-8")
    return whole.replace("@MAX_RANK@", str(MAX_RANK))


def _is_plain(x: Tensor) -> bool:
    """Whether a tensor is nothing but numbers that lie one after the other in the memory of the CPU."""
    return type(x) is Tensor and x.is_cpu and x.is_contiguous()


def _rank_major(factor_Pmr: Tensor) -> Tensor:
    """A factor as contiguous ``(P, r, m)``: a view where it lies so in memory, as the values' factors do."""
    return factor_Pmr.transpose(1, 2).contiguous()


def _usable(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, *others: Tensor) -> bool:
    """Whether nobody but the result needs to know of the call: no autograd, tracing, batching or dispatch mode."""
    dtype = x.dtype
    parts = (a, b, *others) if bias is None else (a, b, bias, *others)
    return (
        dtype in _NAMES
        and a.shape[0] == b.shape[0]
        and a.shape[2] == b.shape[2]
        and (bias is None or bias.shape in (a.shape[1:2], a.shape[:2]))
        and all(part.dtype == dtype and part.is_cpu and type(part) in _PLAIN_TYPES for part in parts)
        and (bias is None or bias.is_contiguous())
        and not (torch.is_grad_enabled() and (x.requires_grad or any(part.requires_grad for part in parts)))
        and is_unobserved()
        and not isinstance(_library(dtype), str)
    )


def _parts(rows: int, work: int) -> int:
    """Into how many parts a call of so many multiply-adds is cut for the threads."""
    if work < PARALLEL_FROM:
        return 1
    threads = torch.get_num_threads()
    return 1 if threads == 1 else min(rows, 4 * threads)


def _call(
    out: Tensor,
    a_Prm: Tensor,
    b_Prn: Tensor,
    *,
    width: int,
    base: Tensor | None = None,
    x: Tensor | None = None,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
) -> None:
    """One job of ``low_rank.c``; ``width`` is the number of multiply-adds per row and rank."""
    entries = _library(out.dtype)
    assert not isinstance(entries, str)
    members, rank, m = a_Prm.shape
    rows = out.numel() // m if m else 0
    if not rows:
        return
    parts = _parts(rows, rows * width * rank) if entries.parallel else 1
    pointers = [None if t is None else t.data_ptr() for t in (base, x, a_Prm, b_Prn, scales, bias, ids)]
    step = m if bias is not None and bias.ndim > 1 else 0
    sizes = (rows, rows // members, b_Prn.shape[2], m, rank, step, parts)
    entries.run(out.data_ptr(), *pointers, *sizes, entries.parallel)


class _Entries:
    """The function of the loaded library, and PyTorch's way into its threads (None if it has no such)."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.run = getattr(library, _NAMES[dtype])
        self.run.argtypes = (*(ctypes.c_void_p,) * 8, *(ctypes.c_int64,) * 7, ctypes.c_void_p)
        self.run.restype = None
        self.parallel = thread_entry()


@functools.cache
def _library(dtype: torch.dtype) -> _Entries | str:
    """The function for a dtype, or the reason why there is none."""
    chosen = ("-DBF16",) if dtype == torch.bfloat16 else ()
    library = compile_c.load("low_rank", source(), (*FLAGS, *chosen))
    return library if isinstance(library, str) else _Entries(library, dtype)
