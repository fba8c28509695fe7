"""Attention of one new position over a cache, in C, on CPUs: what decoding does in every layer.

PyTorch's kernel for CPUs is made for many queries. For one it takes nine times as long as two batched products in
bfloat16, and longer than all other parts of a step of a small model together. Here keys and values are read once, with
all query heads that share them at the same time; scores, weights and sums are float32.

The source (``attention.c``) is compiled on first use.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from eggroll.torch.kernels import compile_c
from eggroll.torch.kernels.low_rank_c import FLAGS, VECTORS
from eggroll.torch.kernels.native import is_unobserved, thread_entry

SOURCE = Path(__file__).with_name("attention.c")
WIDTH, MAX_D = 16, 256
"""Head sizes are multiples of the first, and not larger than the second."""
PARALLEL_FROM = 1 << 16
"""Calls of at least this many multiply-adds are shared out to threads."""
_NAMES = {torch.float32: "eggroll_attention_f32", torch.bfloat16: "eggroll_attention_bf16"}


def attend(q_RH1d: Tensor, k_RKLd: Tensor, v_RKLv: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """``softmax(scale q k^T) v`` for one query position: ``(R, 1, H, v)``; ``None`` if it was not done.

    Args:
        q_RH1d: queries, float32 or bfloat16; ``H`` is a multiple of ``K``, neighboring heads share keys and values.
        k_RKLd: keys, their last axis dense.
        v_RKLv: values, likewise.
        mask: ``(R or 1, 1, 1, L)``, bool: which positions a row sees; ``None`` for all of them.
        scale: of the scores.
    """
    if not _usable(q_RH1d, k_RKLd, v_RKLv, mask):
        return None
    rows, heads, _, size = q_RH1d.shape
    groups, length, width = k_RKLd.shape[1], k_RKLd.shape[2], v_RKLv.shape[3]
    entry = _entry(q_RH1d.dtype)
    if isinstance(entry, str):
        return None
    queries = q_RH1d.reshape(rows, heads, size).contiguous()
    out = torch.empty((rows, 1, heads, width), dtype=queries.dtype)
    mask_row = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
    sizes = (ctypes.c_int64 * 13)(
        rows, groups, heads // groups, length, size, width, *k_RKLd.stride()[:3], *v_RKLv.stride()[:3], mask_row
    )  # fmt: skip
    threads, ways = torch.get_num_threads(), thread_entry()
    many = threads > 1 and ways and rows * heads * length * (size + width) >= PARALLEL_FROM
    parts = min(rows * groups, 4 * threads) if many else 1
    seen = None if mask is None else mask.data_ptr()
    entry(
        out.data_ptr(), queries.data_ptr(), k_RKLd.data_ptr(), v_RKLv.data_ptr(), seen, sizes, scale, parts, ways
    )  # fmt: skip
    return out


def why_not(dtype: torch.dtype = torch.float32) -> str | None:
    """Why the compiled library for a dtype cannot be used here, or ``None``. The first call compiles it."""
    found = _entry(dtype)
    return found if isinstance(found, str) else None


def _usable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    parts = (q, k, v) if mask is None else (q, k, v, mask)
    if not all(type(part) is Tensor and part.is_cpu and part.ndim == 4 for part in parts):
        return False
    if q.dtype not in _NAMES or not q.dtype == k.dtype == v.dtype or q.shape[2] != 1 or 0 in k.shape:
        return False
    rows, heads, _, size = q.shape
    same = k.shape[:3] == v.shape[:3] and k.shape[0] == rows and k.shape[3] == size and heads % k.shape[1] == 0
    sizes = (size, v.shape[3])
    if not same or any(each % WIDTH or each > MAX_D for each in sizes) or k.stride(3) != 1 or v.stride(3) != 1:
        return False
    if mask is not None and not (
        mask.dtype == torch.bool
        and mask.shape[0] in (1, rows)
        and mask.shape[1:] == (1, 1, k.shape[2])
        and mask.stride(3) == 1
    ):
        return False
    followed = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    return not followed and is_unobserved()


@functools.cache
def _entry(dtype: torch.dtype) -> ctypes._CFuncPtr | str:  # type: ignore[name-defined]
    """The function for a dtype, or the reason why there is none."""
    source = VECTORS.read_text(encoding="utf-8") + SOURCE.read_text(encoding="utf-8").replace("@MAX_D@", str(MAX_D))
    library = compile_c.load("attention", source, (*FLAGS, *(("-DBF16",) if dtype == torch.bfloat16 else ())))
    if isinstance(library, str):
        return library
    run = getattr(library, _NAMES[dtype])
    run.argtypes = (*(ctypes.c_void_p,) * 6, ctypes.c_float, ctypes.c_int64, ctypes.c_void_p)
    run.restype = None
    return run
