"""Policies: layers of relu(layer norm), a head for each kind of action, and running normalization of observations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, PRNGKeyArray, PyTree

from eggroll.rl.envs.base import ActionSpace, Continuous, Discrete, MultiDiscrete

EPSILON = 1e-5
"""In layer norm (the paper's networks) and under the root of a variance."""
CLIP = 10.0
"""Bound of a normalized observation, as is usual with running statistics."""
LARGEST = 1e15
"""Observations beyond this, or not finite, are left out of the statistics: one would spoil them for good."""


def init_policy(
    key: PRNGKeyArray, obs_size: int, actions: ActionSpace, *, hidden: int, layers: int, sampling: bool
) -> dict[str, Any]:
    """Parameters: a dict of ``layer_i`` and ``head``, each ``{"weight": (out, in), "bias": (out,)}``, float32.

    Hidden weights are N(0, 1 / in), the head's a hundredth of that, so that a first policy prefers no action. A policy
    that samples continuous actions has ``log_std`` of shape ``(size,)`` besides.
    """
    sizes = [obs_size, *[hidden] * layers, actions.num_outputs]
    params: dict[str, Any] = {}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = index == len(sizes) - 2
        scale = (0.01 if last else 1.0) / math.sqrt(inputs)
        weight = scale * jax.random.normal(jax.random.fold_in(key, index), (outputs, inputs), jnp.float32)
        name = "head" if last else f"layer_{index}"
        params[name] = {"weight": weight, "bias": jnp.zeros(outputs, jnp.float32)}
    if sampling and isinstance(actions, Continuous):
        params["log_std"] = jnp.full(actions.size, -0.5, jnp.float32)
    return params


def forward(params: PyTree, observations: Float[Array, "... obs"]) -> Float[Array, "... outputs"]:
    """``(..., obs_size)`` normalized observations to ``(..., num_outputs)``; then ``log_std`` behind them, if any."""
    x = observations
    for index in range(len([name for name in params if name.startswith("layer_")])):
        layer = params[f"layer_{index}"]
        x = x @ layer["weight"].T + layer["bias"]
        centered = x - x.mean(-1, keepdims=True)
        x = jax.nn.relu(centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + EPSILON))
    outputs = x @ params["head"]["weight"].T + params["head"]["bias"]
    if "log_std" in params:
        spread = jnp.broadcast_to(params["log_std"], (*outputs.shape[:-1], params["log_std"].shape[0]))
        outputs = jnp.concatenate([outputs, spread], axis=-1)
    return outputs


def act(outputs: Float[Array, " outputs"], actions: ActionSpace, key: PRNGKeyArray | None) -> Num[Array, " *action"]:
    """An action from one row of the network's outputs; without a key the best one, with a key a sample."""
    if isinstance(actions, Discrete):
        choice = jnp.argmax(outputs) if key is None else jax.random.categorical(key, outputs)
        return choice.astype(jnp.int32)
    if isinstance(actions, MultiDiscrete):
        keys = [None] * len(actions.nums) if key is None else list(jax.random.split(key, len(actions.nums)))
        heads, start = [], 0
        for num, own in zip(actions.nums, keys, strict=True):
            heads.append(act(outputs[start : start + num], Discrete(num), own))
            start += num
        return jnp.stack(heads)
    mean = outputs[: actions.size]
    if key is not None:
        mean = mean + jnp.exp(outputs[actions.size :]) * jax.random.normal(key, (actions.size,))
    low, high = jnp.asarray(actions.low), jnp.asarray(actions.high)
    return low + (jnp.tanh(mean) + 1) / 2 * (high - low)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ObsStats:
    """Count, mean and sum of squared deviations of observations; parts merge exactly (Chan et al. 1979)."""

    count: Float[Array, ""]
    mean: Float[Array, " obs"]
    m2: Float[Array, " obs"]

    @classmethod
    def empty(cls, obs_size: int) -> ObsStats:
        """Of no observation."""
        return cls(jnp.float32(0), jnp.zeros(obs_size, jnp.float32), jnp.zeros(obs_size, jnp.float32))

    @classmethod
    def of_sums(
        cls,
        count: Float[Array, ""],
        total: Float[Array, " obs"],
        squares: Float[Array, " obs"],
        shift: Float[Array, " obs"],
    ) -> ObsStats:
        """From the sums of ``x - shift`` and its square; a shift near the mean keeps the digits."""
        safe = jnp.maximum(count, 1.0)
        offset = total / safe
        return cls(count, shift + offset, jnp.maximum(squares - total * offset, 0.0))

    def merge(self, other: ObsStats) -> ObsStats:
        """The statistics of both sets of observations together."""
        count = self.count + other.count
        safe = jnp.maximum(count, 1.0)
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / safe)
        return ObsStats(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / safe))

    def normalize(self, observations: Float[Array, "... obs"]) -> Float[Array, "... obs"]:
        """``(x - mean) / std``, within ``CLIP``; as they are before anything was seen."""
        variance = self.m2 / jnp.maximum(self.count, 1.0)
        scaled = (observations - self.mean) * jax.lax.rsqrt(variance + EPSILON)
        return jnp.where(self.count > 1, jnp.clip(scaled, -CLIP, CLIP), observations)
