"""The C library of the fast engine: structures as in ``csrc/engine.h``, compiled at first use."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.torch.kernels import compile_c

SOURCES = Path(__file__).with_name("csrc")
PARTS = ("engine.h", "avx512.c", "avx2.c", "noise.c", "product.c", "forward.c", "update.c")
FLAGS = ("-fwrapv", "-fno-strict-aliasing")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class Matrix(ctypes.Structure):
    """One product."""

    _fields_ = (
        *((name, _POINTER) for name in ("packed", "start")),
        *((name, _INT) for name in ("inputs", "outputs", "divisor", "shift", "parameter", "sums")),
    )


class Model(ctypes.Structure):
    """The model and where its noise comes from."""

    _fields_ = (
        *((name, _INT) for name in ("vocab", "hidden", "layers", "parameters")),
        *((name, _POINTER) for name in ("matrices", "embedding", "vectors", "vector_parameter", "exp2", "log2")),
        *((name, _INT) for name in ("log2_count", "rank", "noise_shift", "pair_bytes", "pair_sums")),
        *((name, _POINTER) for name in ("draws", "table", "normal_table")),
    )


class Work(ctypes.Structure):
    """Members to evaluate."""

    _fields_ = (
        *((name, _INT) for name in ("members", "pairs", "steps", "block")),
        *((name, _POINTER) for name in ("pair", "sign", "window", "tokens")),
        ("token_stride", _INT),
        ("addresses", _POINTER),
        ("address_stride", _INT),
        *((name, _POINTER) for name in ("state_in", "state_out", "logits", "likelihood", "fitness", "scratch")),
    )


class Update(ctypes.Structure):
    """One parameter's update."""

    _fields_ = (
        ("model", ctypes.POINTER(Model)),
        *((name, _INT) for name in ("parameter", "kind", "pairs")),
        *((name, _POINTER) for name in ("addresses", "fitness")),
        ("sign_of_noise", _INT),
        *((name, _POINTER) for name in ("weights", "momentum")),
        *((name, _INT) for name in ("limit", "unit", "shift")),
        ("scratch", _POINTER),
    )


def source() -> str:
    """The C source, all parts one after the other."""
    return "\n".join((SOURCES / part).read_text(encoding="utf-8") for part in PARTS)


@functools.cache
def load(*flags: str) -> ctypes.CDLL | str:
    """The library, or the reason why it cannot be used here; ``flags`` are added to the compiler's usual ones."""
    library = compile_c.load("pretrain", source(), (*FLAGS, *flags))
    if isinstance(library, str):
        return library
    library.eggroll_packed_bytes.argtypes = (_INT, _INT)
    library.eggroll_packed_bytes.restype = _INT
    library.eggroll_pack.argtypes = (_POINTER, _INT, _INT, _POINTER, _POINTER)
    library.eggroll_multiply.argtypes = (ctypes.POINTER(Matrix), _POINTER, _POINTER, _INT)
    library.eggroll_normals.argtypes = (_POINTER, _INT, _INT, _POINTER, _POINTER)
    library.eggroll_evaluate.argtypes = (ctypes.POINTER(Model), ctypes.POINTER(Work))
    library.eggroll_scratch.argtypes = (ctypes.POINTER(Model), ctypes.POINTER(Work))
    library.eggroll_scratch.restype = _INT
    library.eggroll_update.argtypes = (ctypes.POINTER(Update),)
    library.eggroll_update_scratch.argtypes = (ctypes.POINTER(Update),)
    library.eggroll_update_scratch.restype = _INT
    library.eggroll_update.restype = _INT
    for name in ("eggroll_pack", "eggroll_multiply", "eggroll_normals", "eggroll_evaluate"):
        getattr(library, name).restype = None
    return library


def address(array: NDArray[Any] | None) -> int | None:
    """Where an array lies in memory; it must be contiguous, and the caller must keep it alive."""
    if array is None:
        return None
    assert array.flags.c_contiguous, "the library reads arrays as they lie in memory"
    return array.ctypes.data


def multiplies_bytes() -> bool:
    """Whether the library is here and multiplies bytes (AVX-512 VNNI), which only a large GPU does faster.

    With AVX2 it multiplies numbers of 16 bits, a quarter as many at once, and weights are packed so.
    """
    library = load()
    return not isinstance(library, str) and int(library.eggroll_packed_bytes(64, 4)) == 64 * 4


def padded(size: int) -> int:
    """Bytes of a row: the next multiple of 64."""
    return (size + 63) // 64 * 64


def packed_matrix(library: ctypes.CDLL, weight: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int32]]:
    """A weight ``(m, n)`` in the order that the kernel reads, and what its sums start from."""
    outputs, inputs = weight.shape
    packed = np.empty(library.eggroll_packed_bytes(outputs, inputs), np.int8)
    start = np.empty(padded(outputs), np.int32)
    library.eggroll_pack(address(weight), outputs, inputs, address(packed), address(start))
    return packed, start
