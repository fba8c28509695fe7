"""The parts of an RWKV-7 block (arXiv 2503.14456, section 4), each a function of its noisy parameters and its input.

Shapes: ``...`` rows (any number of axes, none too), T tokens, C width, H heads of N entries.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from eggroll.jax.models._leaves import TMM, Parameter
from eggroll.jax.models._tree import call_submodule
from eggroll.jax.models.base_model import CommonParams, Model
from eggroll.jax.models.common import Linear, layer_norm

LOG_DECAY = -math.exp(-0.5)
"""A token's decay is ``exp(LOG_DECAY * sigmoid(...))``, between 0.545 and 1."""


class Shift:
    """Where each token's predecessor is; padding is stepped over.

    Args:
        mask: ``(..., T)`` booleans, false for padding, or ``None`` for no padding.
    """

    def __init__(self, mask: Any) -> None:
        self.mask = mask
        if mask is not None:
            places = jnp.where(mask, jnp.arange(1, mask.shape[-1] + 1), 0)  # 0: the state's token
            last = jax.lax.cummax(places, axis=mask.ndim - 1)
            self.before = jnp.concatenate([jnp.zeros_like(last[..., :1]), last[..., :-1]], axis=-1)[..., None]
            self.end = last[..., -1:, None]

    def __call__(self, x: Any, previous: Any) -> tuple[Any, Any]:
        """The tokens before ``x (..., T, C)``, of which the first is ``previous (..., C)``, and the last token."""
        together = jnp.concatenate([previous[..., None, :], x], axis=-2)
        if self.mask is None:
            return together[..., :-1, :], x[..., -1, :]
        shifted = jnp.take_along_axis(together, self.before, axis=-2)
        return shifted, jnp.take_along_axis(together, self.end, axis=-2)[..., 0, :]


class Norm(Model):
    """Layer norm over the last axis with a scale and a shift."""

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, eps: float) -> Any:
        weight, bias = (call_submodule(Parameter, name, common_params) for name in ("weight", "bias"))
        return layer_norm(x, eps) * weight + bias


class TimeMix(Model):
    """The recurrent half of a block.

    ``v_first`` are the first block's values; ``is_first`` says whether this is the first block, traced or not.
    """

    @classmethod
    def _forward(
        cls, common_params: CommonParams, x: Any, previous: Any, wkv: Any, v_first: Any, is_first: Any, shift: Shift
    ) -> tuple[Any, Any, Any, Any]:
        """``(..., T, C)`` to the output, the new state ``(..., H, N, N)``, the last token, the first block's values."""
        sizes = common_params.frozen_params

        def value(name: str) -> Any:
            return call_submodule(Parameter, name, common_params)

        def pair(name: str, x: Any, between: Any = lambda x: x) -> Any:
            return call_submodule(
                TMM, f"{name}2", common_params, between(call_submodule(TMM, f"{name}1", common_params, x))
            )

        def heads(x: Any) -> Any:
            return x.reshape(*x.shape[:-1], -1, sizes["head_dim"])

        shifted, last = shift(x, previous)
        delta = shifted - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + delta * value(f"x_{name}") for name in "rwkvag")
        r = call_submodule(Linear, "receptance", common_params, x_r)
        w = value("w0") + pair("w", x_w, jnp.tanh)
        k = call_submodule(Linear, "key", common_params, x_k)
        v = call_submodule(Linear, "value", common_params, x_v)
        a = jax.nn.sigmoid(value("a0") + pair("a", x_a))
        g = pair("g", x_g, jax.nn.sigmoid)
        kk = heads(k * value("k_k"))
        kk = kk / jnp.maximum(jnp.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
        k = k * (1 + (a - 1) * value("k_a"))
        if "v0" in common_params.params:
            mixed = v + (v_first - v) * jax.nn.sigmoid(value("v0") + pair("v", x_v))
            v, v_first = jnp.where(is_first, v, mixed), jnp.where(is_first, v, v_first)
        log_w = LOG_DECAY * jax.nn.sigmoid(heads(w).astype(jnp.float32))
        to, fro, values = -kk, kk * heads(a), heads(v)
        if shift.mask is not None:  # padding leaves the state as it is
            keep = shift.mask[..., None, None]
            log_w, to, values = (jnp.where(keep, part, 0) for part in (log_w, to, values))
        y, wkv = recurrence(heads(r), log_w, heads(k), values, to, fro, wkv)
        y = layer_norm(y.astype(x.dtype), sizes["head_norm_eps"])  # a group norm with a group for each head
        y = call_submodule(Affine, "ln_x", common_params, y.reshape(x.shape))
        bonus = heads(r * k * value("r_k")).sum(-1, keepdims=True) * heads(v)
        return call_submodule(Linear, "output", common_params, (y + bonus.reshape(x.shape)) * g), wkv, last, v_first


class Affine(Model):
    """``x * weight + bias``, behind the norm over heads."""

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any) -> Any:
        weight, bias = (call_submodule(Parameter, name, common_params) for name in ("weight", "bias"))
        return x * weight + bias


class ChannelMix(Model):
    """The half of a block that looks one token back."""

    @classmethod
    def _forward(cls, common_params: CommonParams, x: Any, previous: Any, shift: Shift) -> tuple[Any, Any]:
        """``(..., T, C)`` to the output and the last token."""
        shifted, last = shift(x, previous)
        inner = x + (shifted - x) * call_submodule(Parameter, "x_k", common_params)
        inner = jnp.square(jax.nn.relu(call_submodule(Linear, "key", common_params, inner)))
        return call_submodule(Linear, "value", common_params, inner), last


class Block(Model):
    """Time mix and channel mix, each behind a layer norm."""

    @classmethod
    def _forward(
        cls, common_params: CommonParams, x: Any, state: dict[str, Any], v_first: Any, is_first: Any, shift: Shift
    ) -> tuple[Any, dict[str, Any], Any]:
        """``(..., T, C)`` to the same, the block's new state, and the first block's values."""
        eps = common_params.frozen_params["norm_eps"]
        mixed, wkv, att_shift, v_first = call_submodule(
            TimeMix, "att", common_params, call_submodule(Norm, "ln1", common_params, x, eps), state["att_shift"],
            state["wkv"], v_first, is_first, shift,
        )  # fmt: skip
        x = x + mixed
        mixed, ffn_shift = call_submodule(
            ChannelMix, "ffn", common_params, call_submodule(Norm, "ln2", common_params, x, eps), state["ffn_shift"],
            shift,
        )  # fmt: skip
        return x + mixed, {"wkv": wkv, "att_shift": att_shift, "ffn_shift": ffn_shift}, v_first


def recurrence(r: Any, log_w: Any, k: Any, v: Any, a: Any, b: Any, state: Any) -> tuple[Any, Any]:
    """Outputs of all tokens and the state after the last, token by token in float32.

        S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,      y_t = S_t r_t

    Args:
        r, log_w, k, v, a, b: ``(..., T, H, N)``; ``log_w`` is the logarithm of the decay.
        state: ``(..., H, N, N)`` float32, values by keys.

    Returns:
        ``y (..., T, H, N)`` and the new state, float32.
    """
    parts = (r, jnp.exp(log_w), k, v, a, b)
    steps = tuple(jnp.moveaxis(part.astype(jnp.float32), -3, 0) for part in parts)

    def step(state: Any, now: tuple[Any, ...]) -> tuple[Any, Any]:
        r, w, k, v, a, b = now
        applied = (state * a[..., None, :]).sum(-1)
        state = (
            state * w[..., None, :] + applied[..., None] * b[..., None, :] + v[..., None] * k[..., None, :]
        )  # fmt: skip
        return state, (state * r[..., None, :]).sum(-1)

    state, y = jax.lax.scan(step, state, steps)
    return jnp.moveaxis(y, 0, -3), state
