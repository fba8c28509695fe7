"""Episodes of a population: noise is drawn once for each pair and used in every step of its episodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from eggroll.jax.noise import Leaf
from eggroll.jax.perturbed import MemberNoise
from eggroll.jax.strategy import Strategy
from eggroll.rl.envs.base import Environment
from eggroll.rl.policies import LARGEST, ObsStats, act, forward

HELDOUT = 2**31
"""Folded into the key of held-out episodes; generations are counted from 0 and never reach it."""
Outputs = Callable[[Float[Array, "... obs"]], Float[Array, "... outputs"]]
NARROWER, NARROWEST = 4, 32
"""Once only a quarter of a batch is still playing, it shrinks to those episodes, but never below 32."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Played:
    """What episodes gave, in arrays of JAX or of NumPy.

    Attributes:
        returns: sums of rewards.
        lengths: steps.
        count, total, squares: of the observations, shifted by the running mean, one for each part of the members that
            was played at once.
    """

    returns: Float[Array, "... episodes"]
    lengths: Int[Array, "... episodes"]
    count: Float[Array, " parts"]
    total: Float[Array, "parts obs"]
    squares: Float[Array, "parts obs"]


class Rollouts:
    """Episodes in a JAX environment, for a population and for its center.

    Args:
        env: the environment.
        strategy: how the policy's members are made, and the devices that share them.
        episodes: of each member. Both members of a pair play the same ones; pairs play different ones.
        max_steps: steps after which an episode is cut off.
        sampling: whether actions are sampled.
        normalize: whether observations are normalized.
        members_per_forward: members played at once; 0 is all.
    """

    def __init__(
        self,
        env: Environment,
        strategy: Strategy,
        *,
        episodes: int,
        max_steps: int,
        sampling: bool = False,
        normalize: bool = True,
        members_per_forward: int = 0,
    ) -> None:
        self.env, self.policy, self.episodes, self.max_steps = env, strategy.apply, episodes, max_steps
        self.sampling, self.normalize = sampling, normalize
        self.seed = strategy.config.seed
        self.pairs_at_once = max(1, members_per_forward // 2) if members_per_forward else 0
        self.example = jnp.zeros((episodes, env.obs_size), jnp.float32)
        spread = strategy.spread(lambda *given: self._pairs(*given[:-1]), shared_out=(4,))
        self._population: Callable[..., Played] = jax.jit(spread)
        self._center = jax.jit(self._heldout, static_argnums=2)

    def population(
        self, params: PyTree, stats: ObsStats, generation: int, sigma: float, pairs: Int[Array, " pairs"]
    ) -> Played:
        """All episodes of some pairs: arrays ``(pairs, 2, episodes)``; compiled for each number of pairs."""
        return self._population(params, stats, jnp.int32(generation), jnp.float32(sigma), jnp.asarray(pairs, jnp.int32))

    def center(self, params: PyTree, stats: ObsStats, count: int) -> Played:
        """Held-out episodes of the unperturbed policy, the same ones each time: arrays ``(count,)``."""
        return self._center(params, stats, count)

    def draw(self, params: PyTree, stats: ObsStats, path: Path) -> tuple[Path, float] | None:
        """Write an animation of one held-out episode; its file and return, or ``None`` where nothing can be drawn."""
        states, score = self.episode(params, stats)
        written = self.env.render(states, path)
        return None if written is None else (written, score)

    def leaves(self, params: PyTree) -> list[Leaf]:
        """What is evolved."""
        return self.policy.leaves(params, self.example)

    def draws(self, params: PyTree, generation: Int[Array, ""], pairs: Int[Array, " pairs"]) -> dict[str, Any]:
        """The noise of some pairs."""
        return self.policy.draw(self.leaves(params), generation, pairs)

    def keys(self, generation: Int[Array, ""], pair: Int[Array, ""]) -> Key[Array, " episodes"]:
        """Keys of the episodes that both members of a pair play."""
        key = jax.random.fold_in(jax.random.fold_in(self._key(), generation), pair)
        return jax.random.split(key, self.episodes)

    def outputs(
        self,
        params: PyTree,
        draws: dict[str, Any],
        sigma: Float[Array, ""],
        observations: Float[Array, "pairs 2 episodes obs"],
    ) -> Float[Array, "pairs 2 episodes outputs"]:
        """Each member's own network on the observations of its episodes."""

        def member(noise: Any, scale: Any, rows: Any) -> Any:
            return self.policy(params, rows, MemberNoise(noise, scale))

        both = jax.vmap(member, in_axes=(None, 0, 0))
        return jax.vmap(both, in_axes=(0, None, 0))(draws, jnp.array([sigma, -sigma]), observations)

    def _outputs_of(
        self, params: PyTree, draws: dict[str, Any], sigma: Float[Array, ""], episodes: Int[Array, " some"]
    ) -> Outputs:
        """The networks of some of the episodes, by their places among all of them: ``(some, obs)`` to outputs."""
        pairs, signs = episodes // (2 * self.episodes), episodes // self.episodes % 2
        own, scales = jax.tree.map(lambda draw: draw[pairs], draws), jnp.where(signs == 0, sigma, -sigma)

        def one(noise: Any, scale: Any, row: Any) -> Any:
            return self.policy(params, row[None], MemberNoise(noise, scale))[0]

        return lambda observations: jax.vmap(one)(own, scales, observations)

    def _pairs(
        self,
        params: PyTree,
        stats: ObsStats,
        generation: Int[Array, ""],
        sigma: Float[Array, ""],
        pairs: Int[Array, " pairs"],
    ) -> Played:
        count = pairs.shape[0]
        # Parts of one size, at most what was asked for; the last one may be filled up with pairs that do not play.
        parts = -(-count // min(self.pairs_at_once or count, count))
        step = -(-count // parts)

        def part(arguments: tuple[Any, Any]) -> Played:
            numbers, real = arguments
            draws = self.draws(params, generation, numbers)
            keys = jnp.repeat(jax.vmap(lambda pair: self.keys(generation, pair))(numbers)[:, None], 2, axis=1)
            playing = jnp.broadcast_to(real[:, None, None], keys.shape).reshape(-1)
            # Each episode has a copy of its noise then; dense noise of many episodes would not fit.
            narrows = self.policy.low_rank or self.episodes <= 2
            some = functools.partial(self._outputs_of, params, draws, sigma) if narrows else None
            return self.play(lambda x: self.outputs(params, draws, sigma, x), keys, stats, playing, some)

        if parts == 1:
            return part((pairs, jnp.ones(count, bool)))
        filled = jnp.concatenate([pairs, jnp.repeat(pairs[-1:], parts * step - count)])
        real = jnp.arange(parts * step) < count
        played = jax.lax.map(part, (filled.reshape(parts, step), real.reshape(parts, step)))
        return Played(
            played.returns.reshape(-1, 2, self.episodes)[:count], played.lengths.reshape(-1, 2, self.episodes)[:count],
            played.count.reshape(-1), played.total.reshape(-1, self.env.obs_size),
            played.squares.reshape(-1, self.env.obs_size),
        )  # fmt: skip

    def _heldout(self, params: PyTree, stats: ObsStats, count: int) -> Played:
        keys = jax.random.split(jax.random.fold_in(self._key(), HELDOUT), count)
        return self.play(lambda observations: forward(params, observations), keys, stats)

    def episode(self, params: PyTree, stats: ObsStats, index: int = 0) -> tuple[list[PyTree], float]:
        """The states of one held-out episode, and its return."""
        key = jax.random.split(jax.random.fold_in(self._key(), HELDOUT), index + 1)[index]
        start, key = jax.random.split(key)
        reset, step = jax.jit(self.env.reset), jax.jit(self.env.step)
        state, observation = reset(start)
        states, total = [state], 0.0

        def choose(observation: Any, own: Any) -> Any:
            seen = stats.normalize(observation) if self.normalize else observation
            return act(forward(params, seen), self.env.actions, own if self.sampling else None)

        choose_once = jax.jit(choose)
        for number in range(self.max_steps):
            now = jax.random.fold_in(key, number)
            state, observation, reward, done = step(now, state, choose_once(observation, jax.random.fold_in(now, 1)))
            states.append(state)
            total += float(reward)
            if bool(done):
                break
        return states, total

    def _key(self) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.key(self.seed % 2**32), 0x5EED)

    def play(
        self,
        outputs: Outputs,
        keys: Key[Array, " *episodes"],
        stats: ObsStats,
        playing: Bool[Array, " flat"] | None = None,
        some: Callable[[Int[Array, " some"]], Outputs] | None = None,
    ) -> Played:
        """Play until every episode is over; ``outputs`` maps observations of the keys' shape.

        Only episodes of which the flat ``playing`` is true take part; ``None`` is all. With ``some``, which gives the
        networks of some of the flat episodes, those that last longer than most go on in smaller batches: a step costs
        as much for an episode that is over as for one that is not.
        """
        shape, env = keys.shape, self.env
        flat = keys.reshape(-1)
        count = flat.shape[0]
        starts, own = jax.vmap(lambda key: tuple(jax.random.split(key)))(flat)
        states, observations = jax.vmap(env.reset)(starts)
        alive = jnp.ones(count, bool) if playing is None else playing
        places, step = jnp.arange(count), jnp.int32(0)
        returns, lengths = jnp.zeros(count, jnp.float32), jnp.zeros(count, jnp.int32)
        sums = (jnp.float32(0), jnp.zeros(env.obs_size), jnp.zeros(env.obs_size))

        def whole(x: Any) -> Any:
            return outputs(x.reshape(*shape, env.obs_size)).reshape(count, -1)

        widths = _widths(count) if some is not None else [count]
        for width, enough in zip(widths, [*widths[1:], 0], strict=True):
            network = whole if some is None or width == count else some(places)
            carry = (step, states, observations, alive, returns[places], lengths[places], sums)
            step, states, observations, alive, gained, played, sums = self._play_on(network, own, stats, carry, enough)
            returns, lengths = returns.at[places].set(gained), lengths.at[places].set(played)
            if enough:  # the ones that go on, in their order; then some that are over
                chosen = jnp.argsort(~alive, stable=True)[:enough]
                left = (states, observations, alive, own, places)
                states, observations, alive, own, places = jax.tree.map(lambda value: value[chosen], left)  # noqa: B023
        return Played(returns.reshape(shape), lengths.reshape(shape), *(value[None] for value in sums))

    def _play_on(self, network: Outputs, own: Any, stats: ObsStats, carry: Any, enough: int) -> Any:
        """Take steps until at most ``enough`` episodes are still going."""
        env = self.env

        def going(carry: Any) -> Any:
            step, _, _, alive, *_ = carry
            return (step < self.max_steps) & (alive.sum() > enough)

        def advance(carry: Any) -> Any:
            step, states, observations, alive, returns, lengths, (count, total, squares) = carry
            raw = network(stats.normalize(observations) if self.normalize else observations)
            now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(own, step)
            if self.sampling:
                actions = jax.vmap(lambda o, k: act(o, env.actions, jax.random.fold_in(k, 1)))(raw, now)
            else:
                actions = jax.vmap(lambda o: act(o, env.actions, None))(raw)
            if self.normalize:
                sound = alive & (jnp.abs(observations) <= LARGEST).all(axis=1)
                shifted = jnp.where(sound[:, None], observations - stats.mean, 0.0)
                count, total = count + sound.sum(), total + shifted.sum(0)
                squares = squares + (shifted**2).sum(0)
            states, observations, rewards, done = jax.vmap(env.step)(now, states, actions)
            returns = returns + jnp.where(alive, rewards, 0.0)
            lengths = lengths + alive
            return step + 1, states, observations, alive & ~done, returns, lengths, (count, total, squares)

        return jax.lax.while_loop(going, advance, carry)


def _widths(count: int) -> list[int]:
    """Batch sizes for ``count`` episodes, from all of them down to the smallest."""
    found = [count]
    while found[-1] // NARROWER >= NARROWEST:
        found.append(found[-1] // NARROWER)
    return found
