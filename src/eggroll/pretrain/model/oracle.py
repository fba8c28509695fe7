"""The integer model in NumPy: what every engine must equal, bit for bit (EGGROLL section 6.1, appendices G to I).

With ``I8`` clipping to -127..127, ``//`` and ``>>`` rounding down, and ``x @ W = I8(x W^T // (16 sqrt(n)))``:

    s = 0 before a token 0                                    u = LN(x, ln1)
    f = I8(u @ Wf + s @ Uf + bf)                              g = f + 127
    h' = I8(u @ Wh + ((g s) >> 8) @ Uh + bh)                  s = s + ((g (h' - s)) >> 8)
    x = I8(x + s)                                             x = I8(x + (LN(x, ln2) @ up) @ down)
    LN(x, w) = I8((x w) // max(1, sum|x| // D))               logits = LN(x, ln_out) @ head

The products are clipped each by itself before they are added; a sum is clipped once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.core import threefry
from eggroll.core.address import parameter_key
from eggroll.errors import DataError
from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.fixed_point import FIXED_POINT, GATE_BITS, LIMIT, LOGIT_OFFSET, ONE, i8
from eggroll.pretrain.model.shape import ModelShape, Parameter

Params = Mapping[str, NDArray[np.int8]]
Factors = tuple[NDArray[np.int8], NDArray[np.int8]]
"""``A (rank, outputs)`` and ``B (rank, inputs)`` of one parameter; the member's sign is in A."""
Draws = Mapping[str, Factors]


def noise_shift(rank: int, sigma_shift: int) -> int:
    """Bits that a product of two draws is shifted by: ``4 + sigma_shift + log4 r``, the last rounded (halves up).

    Two draws of standard deviation 16 make products of 256; four bits are the fixed point, so the perturbation has a
    standard deviation of ``2^-sigma_shift`` (1.0 is 16). A sum of ``r`` of them is ``sqrt(r)`` times as large, which
    the last term takes out to within a factor of 0.71 to 1.33 (exactly for powers of four); the paper has rank 1 only.
    """
    return FIXED_POINT + sigma_shift + rank.bit_length() // 2


def init_params(shape: ModelShape, seed: int = 0) -> dict[str, NDArray[np.int8]]:
    """The parameters before training: ``round(16 N(0, 1))`` in matrices, 16 in norms, 0 in biases."""
    made = {}
    for parameter in shape.parameters:
        if parameter.kind == "vector":
            value = 0 if parameter.name.endswith((".bf", ".bh")) else ONE
            made[parameter.name] = np.full(parameter.shape, value, np.int8)
        else:
            key = parameter_key(seed, f"init/{parameter.name}")
            made[parameter.name] = normals(key, int(np.prod(parameter.shape))).reshape(parameter.shape)
    return made


def normals(key: threefry.Key, count: int) -> NDArray[np.int8]:
    """``(count,)`` int8 normals of a key: word ``i`` of its draw makes normals ``2i`` (low 16 bits) and ``2i + 1``."""
    words = threefry.random_bits(key, (count + 1) // 2)
    halves = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], axis=-1)
    return fixed_point.normal_table()[halves.reshape(-1)[:count]]


def perturbation(scales: NDArray[np.int32], a: NDArray[np.int8], shift: int) -> NDArray[np.int32]:
    """``(scales A) >> shift``: ``(..., outputs)`` int32 from ``scales (..., rank)``, modulo 2^32.

    A sum that leaves int32 wraps. With draws of at most 69 that needs ``127 * 69^2 n r >= 2^31``, inputs that are all
    at their limit, and noise that is parallel to them.
    """
    with np.errstate(over="ignore"):
        return (scales @ a.astype(np.int32)) >> shift


def product(
    x: NDArray[np.int8], weight: NDArray[np.int8], factors: Factors | None = None, shift: int = 0
) -> NDArray[np.int8]:
    """``I8((x W^T + (((x . B) A) >> shift)) // (16 sqrt(n)))``: ``(..., m)`` int8 from ``x (..., n)``, ``W (m, n)``."""
    wide = x.astype(np.int32)
    total = wide @ weight.astype(np.int32).T
    if factors is not None:
        a, b = factors
        total = total + perturbation(wide @ b.astype(np.int32).T, a, shift)
    return i8(total // fixed_point.divisor(weight.shape[1]))


def perturbed_vector(vector: NDArray[np.int8], factors: Factors | None = None, shift: int = 0) -> NDArray[np.int8]:
    """A bias or norm weight: ``I8(v + ((sum_r a b) >> shift))``, elementwise."""
    if factors is None:
        return vector
    a, b = (factor.astype(np.int32) for factor in factors)
    return i8(vector + ((a * b).sum(axis=0, dtype=np.int32) >> shift))


def layer_norm(x: NDArray[np.int8], weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """``I8((x w) // max(1, sum|x| // D))`` over the last axis: no mean, and the L1 norm instead of the L2 norm."""
    wide = x.astype(np.int32)
    size = np.maximum(1, np.abs(wide).sum(axis=-1, keepdims=True) // x.shape[-1])
    return i8((wide * weight) // size)


def forward(
    params: Params,
    tokens: NDArray[Any],
    state: NDArray[np.int8] | None = None,
    *,
    draws: Draws | None = None,
    shift: int = 0,
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Run the model over a sequence.

    Args:
        params: int8 arrays: ``emb (V, D)``, ``blocks.{i}.ln1 (D,)``, ``blocks.{i}.gru.{Wf,Uf,Wh,Uh} (D, D)``,
            ``blocks.{i}.gru.{bf,bh} (D,)``, ``blocks.{i}.ln2 (D,)``, ``blocks.{i}.mlp.up (4D, D)``,
            ``blocks.{i}.mlp.down (D, 4D)``, ``ln_out (D,)``, ``head (V, D)``. They are not changed.
        tokens: ``(T,)`` whole numbers below V. A token 0 begins a document: the state is 0 before it.
        state: ``(L, D)`` int8, the hidden state before the first token; ``None`` is zeros.
        draws: of a member of the population: by name, for every parameter; ``None`` is the model itself.
        shift: of the draws, from :func:`noise_shift`.

    Returns:
        Logits ``(T, V)`` int8, in sixteenths of a bit, and the state after the last token, ``(L, D)`` int8.

    Raises:
        DataError: tokens or the state are not those of such a model.
    """
    shape = ModelShape.of(params)
    tokens = check_tokens(tokens, shape.vocab)
    factors = (lambda name: None) if draws is None else draws.__getitem__
    vectors = {
        p.name: perturbed_vector(params[p.name], factors(p.name), shift) for p in shape.parameters if p.kind == "vector"
    }
    hidden = np.zeros((shape.n_layers, shape.hidden), np.int8) if state is None else check_state(state, shape).copy()

    def at(x: NDArray[np.int8], name: str) -> NDArray[np.int8]:
        return product(x, params[name], factors(name), shift)

    logits = np.zeros((len(tokens), shape.vocab), np.int8)
    for t, token in enumerate(tokens):
        if token == 0:
            hidden[:] = 0
        x = _embed(params["emb"], int(token), factors("emb"), shift)
        for i in range(shape.n_layers):
            gru, mlp = f"blocks.{i}.gru", f"blocks.{i}.mlp"
            u, s = layer_norm(x, vectors[f"blocks.{i}.ln1"]), hidden[i].astype(np.int32)
            f = i8(at(u, f"{gru}.Wf").astype(np.int32) + at(hidden[i], f"{gru}.Uf") + vectors[f"{gru}.bf"])
            gate = f.astype(np.int32) + LIMIT
            kept = ((gate * s) >> GATE_BITS).astype(np.int8)
            candidate = i8(at(u, f"{gru}.Wh").astype(np.int32) + at(kept, f"{gru}.Uh") + vectors[f"{gru}.bh"])
            hidden[i] = (s + ((gate * (candidate - s)) >> GATE_BITS)).astype(np.int8)
            x = i8(x.astype(np.int32) + hidden[i])
            u = layer_norm(x, vectors[f"blocks.{i}.ln2"])
            x = i8(x.astype(np.int32) + at(at(u, f"{mlp}.up"), f"{mlp}.down"))
        logits[t] = at(layer_norm(x, vectors["ln_out"]), "head")
    return logits, hidden


def log_likelihood(logits: NDArray[np.int8], targets: NDArray[Any]) -> NDArray[np.int32]:
    """``y[target] + 128 - log2 sum 2^(y + 128)`` in sixteenths of a bit, by tables: ``(T,)`` int32, about 0 or less.

    Args:
        logits: ``(T, V)`` int8.
        targets: ``(T,)`` whole numbers below V.
    """
    targets = check_tokens(targets, logits.shape[1])
    shifted = logits.astype(np.int32) + LOGIT_OFFSET
    total = fixed_point.exp2_table()[shifted].sum(axis=1, dtype=np.int32)
    return shifted[np.arange(len(targets)), targets] - fixed_point.log2_sixteenths(total)


def fitness(params: Params, tokens: NDArray[Any], state: NDArray[np.int8] | None = None, **member: Any) -> int:
    """Sum over a window of ``T + 1`` tokens of the log likelihood of all but the first, sixteenths of a bit."""
    logits, _ = forward(params, tokens[:-1], state, **member)
    return int(log_likelihood(logits, tokens[1:]).sum())


def check_tokens(tokens: NDArray[Any], vocab: int) -> NDArray[np.int64]:
    """Tokens as int64.

    Raises:
        DataError: there is none, or one is not a whole number from 0 to ``vocab - 1``.
    """
    values = np.asarray(tokens)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.size == 0:
        raise DataError(f"tokens must be (T,) whole numbers, T >= 1; got {values.dtype} {values.shape}")
    if values.min() < 0 or values.max() >= vocab:
        raise DataError(f"tokens must be from 0 to {vocab - 1}; got {values.min()} to {values.max()}")
    return values.astype(np.int64)


def check_state(state: NDArray[Any], shape: ModelShape) -> NDArray[np.int8]:
    """A hidden state, ``(L, D)`` int8, as it is.

    Raises:
        DataError: it has another shape, or is not int8.
    """
    form, values = (shape.n_layers, shape.hidden), np.asarray(state)
    if values.shape != form or values.dtype != np.int8:
        raise DataError(f"state must be int8 (L, D) = {form}; got {values.dtype} {values.shape}")
    return np.ascontiguousarray(values)


def _embed(table: NDArray[np.int8], token: int, factors: Factors | None, shift: int) -> NDArray[np.int8]:
    """The row of a token; a perturbation's row is ``(B[token] A) >> shift``, as if the input were one-hot."""
    if factors is None:
        return table[token]
    a, b = factors
    return i8(table[token] + perturbation(b[:, token].astype(np.int32), a, shift))


def member_draws(parameters: Sequence[Parameter], rank: int, drawn: Mapping[str, NDArray[np.int8]], sign: int) -> Draws:
    """The factors of a member: a draw is ``(rank, inputs + outputs)``, first B, then A; the sign goes to A."""
    made = {}
    for p in parameters:
        both = drawn[p.name].reshape(rank, p.inputs + p.outputs)
        made[p.name] = ((sign * both[:, p.inputs :]).astype(np.int8), both[:, : p.inputs])
    return made
