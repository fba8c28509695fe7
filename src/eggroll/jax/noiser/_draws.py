"""The draws behind a perturbation: key, shape and sign of the noise of a member (FACTS.md section 1.2).

key  = fold_in(fold_in(base_key, true_epoch), thread_id // 2)      true_epoch = 0 or epoch // noise_reuse
sign = +1 for even, -1 for odd thread_id                           so threads 2k and 2k + 1 are antithetic
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from eggroll.errors import ConfigError

IterInfo = tuple[Any, Any]
"""``(epoch, thread_id)``: two integer scalars, traced or not."""


def true_epoch(epoch: Any, noise_reuse: int) -> Any:
    """The epoch of the noise: ``epoch // noise_reuse``, or 0 for ``noise_reuse=0`` (the same noise forever)."""
    return epoch // noise_reuse if noise_reuse else epoch * 0


def sign_of(thread_id: Any) -> Any:
    """+1.0 for even and -1.0 for odd thread ids, float32."""
    return jnp.where(jnp.asarray(thread_id) % 2 == 0, jnp.float32(1), jnp.float32(-1))


def draw_key(base_key: Any, epoch: Any, pair: Any) -> Any:
    """The key of one draw; ``epoch`` is a true epoch, ``pair`` a ``thread_id // 2``."""
    return jax.random.fold_in(jax.random.fold_in(base_key, epoch), pair)


def member_key(frozen_noiser_params: dict[str, Any], iterinfo: IterInfo, base_key: Any) -> Any:
    """The key of a member's draw."""
    epoch, thread_id = iterinfo
    return draw_key(base_key, true_epoch(epoch, frozen_noiser_params["noise_reuse"]), thread_id // 2)


def factor_draw(key: Any, shape: tuple[int, ...], dtype: Any, rank: int) -> tuple[Any, Any]:
    """``A`` ``(a, rank)`` and ``B`` ``(b, rank)`` of a matrix of the shape ``(a, b)``: iid N(0, 1), not scaled.

    One draw of ``(a + b, rank)``: its first ``b`` rows are B, the next ``a`` rows are A.
    """
    rows, columns = matrix_shape(shape)
    factors = jax.random.normal(key, (rows + columns, rank), dtype)
    return factors[columns:], factors[:columns]


def scaled(noise: Any, scale: Any) -> Any:
    """``scale * noise`` in the noise's dtype, rounded once: half precision is multiplied in float32."""
    wide = accumulator(noise.dtype)
    return (noise.astype(wide) * jnp.asarray(scale, wide)).astype(noise.dtype)


def accumulator(dtype: Any) -> Any:
    """The dtype to add up in: float32 for half precision, else the dtype itself."""
    return jnp.promote_types(dtype, jnp.float32)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape itself, which must have two axes.

    Raises:
        ConfigError: it has not.
    """
    if len(shape) != 2:
        raise ConfigError(
            f"a low-rank perturbation needs a parameter with 2 axes, but this one has the shape {tuple(shape)}; "
            "scan over leading axes (scan_map), or treat it as PARAM and use get_noisy_standard"
        )
    return int(shape[0]), int(shape[1])


def dense_draw(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """iid N(0, 1) of the shape, not scaled."""
    return jax.random.normal(key, shape, dtype)
