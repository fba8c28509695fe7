"""From random bits to normals: the recipe and the numbers of the noise specification (docs/noise-spec.md, version 1).

A normal is made from its 32 bits by additions, multiplications, divisions and square roots in float32 alone, each
rounded once and none fused, so every implementation that follows the recipe gives the same float, bit for bit:

    n = int32(bits ^ 0x80000000) >> 9                   x = n 2^-22 + 2^-24, exact: uniform on [nextafter(-1, 0), 1)
    s = 1 - x x                                         s = m 2^e, sqrt(1/2) <= m < sqrt(2), from the bits of s
    g = (m - 1) / (m + 1)                               w = e (-ln 2) + g ((L2 g g + L1) g g + L0), that is -log(s)
    z = w - 2.5 if w < 5, else sqrt(w) - 3              r = Horner(CENTER or TAIL, z)          normal = (r x) sqrt(2)

CENTER and TAIL are Giles' polynomials for the inverse error function, the ones that ``jax.random.normal`` evaluates
("Approximating the erfinv function", GPU Computing Gems, 2010); L is a minimax fit of -log((1 + g) / (1 - g)) / g.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _rounded(*values: float) -> tuple[float, ...]:
    """The float32 nearest to each value, as Python floats: no implementation can then round them differently."""
    return tuple(float(np.float32(value)) for value in values)


SQRT_HALF_BITS = 0x3F3504F3
LOG = _rounded(-0.41517706, -0.66644078, -2.00000084)
CENTER = _rounded(
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
TAIL = _rounded(
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip
MINUS_LN_2, SQRT_2 = _rounded(-np.log(2.0), np.sqrt(2.0))
TAIL_FROM = 5.0


def bits_to_normal(bits: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Standard normals (float32) from 32-bit words, ``sqrt(2) * erfinv(u)``, operation for operation as above."""
    one = np.float32(1.0)
    n = (bits ^ np.uint32(0x80000000)).view(np.int32) >> 9
    x = n.astype(np.float32) * np.float32(2.0**-22) + np.float32(2.0**-24)
    s_bits = (one - x * x).view(np.int32)
    exponent = (s_bits - np.int32(SQRT_HALF_BITS)) >> 23
    m = (s_bits - (exponent << 23)).view(np.float32)
    g: NDArray[np.float32] = (m - one) / (m + one)
    w = exponent.astype(np.float32) * np.float32(MINUS_LN_2) + g * _horner(LOG, g * g)
    in_tail = w >= np.float32(TAIL_FROM)
    center = _horner(CENTER, w - np.float32(2.5))
    tail = _horner(TAIL, np.sqrt(np.maximum(w, np.float32(0.0))) - np.float32(3.0))
    return np.where(in_tail, tail, center) * x * np.float32(SQRT_2)


def _horner(coefficients: tuple[float, ...], z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The polynomial, highest power first, each product and each sum rounded to float32."""
    result = np.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * z + np.float32(coefficient)
    return result
