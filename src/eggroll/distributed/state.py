"""A replica's state as plain bytes: what travels between workers, and what is compared."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Packed = dict[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]]
"""Name to dtype, shape and bytes. Arrays of bytes go through an object store without a copy, whatever the dtype."""


def pack(tensors: Mapping[str, Any]) -> Packed:
    """Tensors (PyTorch on any device, or NumPy) as bytes. Memory is shared with tensors that are on the CPU."""
    packed: Packed = {}
    for name, value in tensors.items():
        if hasattr(value, "detach"):
            import torch

            tensor = value.detach().cpu().contiguous()
            packed[name] = (str(tensor.dtype), tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy())
        else:  # a worker without PyTorch does not load it for this
            array = np.asarray(value)
            packed[name] = (array.dtype.str, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return packed


def unpack(packed: Packed) -> dict[str, Any]:
    """What :func:`pack` was given, on the CPU. The bytes' memory is shared, and may be read-only."""
    return {name: _tensor(dtype, data).reshape(shape) for name, (dtype, shape, data) in packed.items()}


def torch_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """All of them as PyTorch tensors, which is what a checkpoint holds, without a copy."""
    return {name: _from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in tensors.items()}


def _tensor(dtype: str, data: NDArray[np.uint8]) -> Any:
    if not dtype.startswith("torch."):
        return data.view(dtype)
    import torch

    return _from_numpy(data).view(getattr(torch, dtype.removeprefix("torch.")))


def _from_numpy(array: NDArray[Any]) -> Any:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def digest(tensors: Mapping[str, Any]) -> str:
    """BLAKE2b of the parameters and their masters: names, dtypes, shapes and bits.

    The optimizer's own state is left out: what is wrong in it shows in the parameters one update later.
    """
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        if not name.startswith("optimizer/"):
            dtype, shape, data = pack({name: tensors[name]})[name]
            found.update(f"{name} {dtype} {shape}\n".encode())
            found.update(data.data)
    return found.hexdigest()
