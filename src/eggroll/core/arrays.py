"""NumPy, PyTorch and JAX arrays through one set of functions, without importing a library for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
"""A NumPy array, a PyTorch tensor or a JAX array."""


def namespace(array: Array) -> Any:
    """The module whose functions take this array: ``numpy``, ``torch`` or ``jax.numpy``.

    Anything else (a list, a number) belongs to NumPy. An array's library is loaded already, so none is imported.
    """
    library = type(array).__module__.partition(".")[0]
    if library == "torch":
        return sys.modules["torch"]
    return sys.modules["jax.numpy"] if library in ("jax", "jaxlib") else np


def is_traced(array: Array) -> bool:
    """Whether the values are not known yet: inside ``jax.jit`` or ``torch.compile``."""
    xp = namespace(array)
    if xp.__name__ == "torch":
        return bool(xp.compiler.is_compiling())
    return xp is not np and isinstance(array, sys.modules["jax"].core.Tracer)


def widened(array: Array) -> Array:
    """The array in the dtype for sums: float64; in JAX float32, or the array's own dtype if that is wider."""
    xp = namespace(array)
    if xp.__name__ == "torch":
        return array.detach().double()
    return np.asarray(array, np.float64) if xp is np else array.astype(xp.promote_types(array.dtype, xp.float32))


def cast(array: Array, dtype: Any) -> Array:
    """The array in another dtype of its library."""
    return array.to(dtype) if namespace(array).__name__ == "torch" else array.astype(dtype)


def sort(array: Array) -> Array:
    """A vector in ascending order."""
    xp = namespace(array)
    return xp.sort(array).values if xp.__name__ == "torch" else xp.sort(array)


def each_column(function: Callable[[Array], Array], table: Array) -> Array:
    """A function of vectors applied to each column of a table; the results are columns again."""
    xp = namespace(table)
    if xp.__name__ == "jax.numpy" and table.shape[1] > 1:  # compiling must not grow with the number of columns
        return sys.modules["jax"].vmap(function, in_axes=1, out_axes=1)(table)
    columns = table.T.contiguous() if xp.__name__ == "torch" else table.T
    return xp.stack([function(column) for column in columns], axis=1)
