"""Noise on any device: Threefry-2x32 bits and standard normals, for many keys in one call (docs/noise-spec.md).

Element ``i`` of the draw of a key is a function of (key, i) alone: of neither the device, nor the number of threads,
nor the keys and elements drawn with it. Three versions compute it, and their results are equal, bit for bit:

- on a CPU with a C compiler, a small C library that is compiled on first use in a fraction of a second;
- on CUDA with Triton, one kernel;
- anywhere else, plain PyTorch operations.

The environment variable ``EGGROLL_COMPILE_NOISE`` decides about the C library: ``0`` never, ``1`` always (an error if
it cannot be made), unset: if it can be made.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll._environment import COMPILE_NOISE, value
from eggroll.errors import ConfigError
from eggroll.torch.kernels import threefry_c, threefry_eager

Keys = NDArray[np.uint32] | Tensor
"""``(K, 2)``: two unsigned 32-bit words per key, as a NumPy array or as an int64 or uint32 tensor."""


def normals(
    keys: Keys, count: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, start: int = 0
) -> Tensor:
    """Standard normals ``(K, count)``: elements ``start`` to ``start + count`` of the draw of each key.

    They are computed in float32 and then cast to ``dtype``. They equal ``eggroll.core.threefry.normal`` and
    ``jax.random.normal`` to 3 units in the last place (which is also how far those two are apart).

        >>> normals(np.array([[0, 42]], np.uint32), 3)
        tensor([[-0.0283,  0.4671,  0.2957]])

    Args:
        keys: ``(K, 2)`` keys, each two unsigned 32-bit words.
        count: elements per key.
        device: where the result is made.
        dtype: a floating dtype of the result.
        start: index of the first element; elements are numbered to ``2**64 - 1``.

    Raises:
        ValueError: the keys are no ``(K, 2)`` words, or count, start or dtype are out of range.
        ConfigError: ``EGGROLL_COMPILE_NOISE`` is ``1`` and the C library cannot be made, or it is none of 0 and 1.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype (={dtype}) must be a floating dtype; random_bits draws integers")
    words = _words(keys, count, start)
    out = torch.empty((len(words), count), dtype=dtype, device=device)
    if out.numel():
        _kernels(out.device).fill_normals(out, words, start)
    return out


def random_bits(keys: Keys, count: int, *, device: torch.device | str = "cpu", start: int = 0) -> Tensor:
    """The 32 bits behind each element, as int32 ``(K, count)``: exactly those of ``jax.random.bits``.

    Arguments and errors as for :func:`normals`.
    """
    words = _words(keys, count, start)
    out = torch.empty((len(words), count), dtype=torch.int32, device=device)
    if out.numel():
        _kernels(out.device).fill_bits(out, words, start)
    return out


def _words(keys: Keys, count: int, start: int) -> NDArray[np.uint32]:
    """The checked keys as ``(K, 2)`` words."""
    words = keys.cpu().numpy() if isinstance(keys, Tensor) else np.asarray(keys)
    if words.ndim != 2 or words.shape[1] != 2 or words.dtype.kind not in "iu":
        raise ValueError(
            f"keys must be whole numbers of shape (K, 2), two 32-bit words per key; got {words.dtype} {words.shape}"
        )
    if count < 0 or start < 0 or start + count > 1 << 64:
        raise ValueError(f"count (={count}) and start (={start}) must not be negative, and start + count at most 2**64")
    # A negative int32 is the same 32 bits as the unsigned word, so no dtype needs a special case.
    return words.astype(np.uint32)


def _kernels(device: torch.device) -> ModuleType:
    """The fastest version for a device."""
    if device.type == "cpu":
        return threefry_c if _use_compiled(value(COMPILE_NOISE)) else threefry_eager
    if device.type == "cuda":
        return _triton_kernels(device) or threefry_eager
    return threefry_eager


def _use_compiled(setting: str) -> bool:
    if setting not in ("", "0", "1"):
        raise ConfigError(
            f"{COMPILE_NOISE} (={setting!r}) must be 0 (never compile), 1 (always) or unset (if possible)"
        )
    if setting == "0":
        return False
    reason = threefry_c.why_not()
    if reason and setting == "1":
        raise ConfigError(f"{COMPILE_NOISE}=1, but {reason}. Install a C compiler, or unset the variable.")
    return reason is None


@functools.cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """The Triton version, or None where Triton is missing or cannot compile (it too needs a C compiler)."""
    try:
        from eggroll.torch.kernels import threefry_triton

        threefry_triton.fill_bits(torch.empty((1, 1), dtype=torch.int32, device=device), np.zeros((1, 2), np.uint32), 0)
    except ImportError:
        return None
    except Exception as error:
        # Triton raises errors of many kinds. Speed is lost, but no result changes, so this is no reason to stop.
        warnings.warn(f"noise is drawn without Triton, several times slower: {error!r}", RuntimeWarning, stacklevel=4)
        return None
    return threefry_triton
