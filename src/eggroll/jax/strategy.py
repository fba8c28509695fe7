"""Ask and tell around any JAX fitness function: evaluate a population, estimate, update with any optax optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Float, Float32, Int32, PyTree

from eggroll.core.config import ESConfig
from eggroll.errors import ConfigError
from eggroll.jax.anchor import towards_start
from eggroll.jax.gradient import es_gradient
from eggroll.jax.layout import named_leaves
from eggroll.jax.noise import Leaf, draw_pairs
from eggroll.jax.perturbed import Address, MemberNoise, Perturbed


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where a run is.

    Attributes:
        params: the center.
        opt_state: of the optax optimizer.
        generation: updates done.
        masters: float32 copies of 16-bit parameters by path, so that small steps are not lost to rounding.
    """

    params: PyTree[Array]
    opt_state: PyTree[Array]
    generation: Int32[Array, ""]
    masters: dict[str, Float32[Array, "*shape"]]


def optimizer_for(config: ESConfig) -> optax.GradientTransformation:
    """The optax rule that ``config.optimizer`` names, for a learning rate of 1; its steps are scaled by ``lr``.

    The rules of :mod:`eggroll.torch.updater`: weight decay, to zero or to the start, is decoupled for adamw and added
    to the gradient elsewhere.
    """
    if config.anchored_weight_decay:
        strength = config.anchored_weight_decay
        plain = optimizer_for(replace(config, anchored_weight_decay=0.0))
        if config.optimizer == "adamw":
            return optax.chain(plain, towards_start(-strength))
        return optax.chain(towards_start(strength), plain)
    decay = optax.add_decayed_weights(config.weight_decay)
    first, second = config.betas
    rules = {
        "sgd": optax.chain(decay, optax.sgd(1.0)),
        "momentum": optax.chain(decay, optax.sgd(1.0, momentum=config.momentum)),
        "adam": optax.chain(decay, optax.adam(1.0, b1=first, b2=second)),
        "adamw": optax.adamw(1.0, b1=first, b2=second, weight_decay=config.weight_decay),
    }
    return rules[config.optimizer]


class Strategy:
    """EGGROLL for a fitness function ``(params, x) -> score`` that JAX can trace.

    Args:
        fitness: gives one score, higher is better, for parameters and any further pytree ``x`` (a batch, a key). It may
            be a whole rollout.
        config: the settings of the algorithm. ``target_modules`` and ``exclude`` are path patterns; ``None`` evolves
            every floating-point leaf.
        optimizer: any optax transformation, with its own learning rate; ``None`` takes ``config.optimizer`` with
            ``config.lr`` and its schedule.
        x_per_member: ``x`` has a first axis of length ``population_size``; otherwise all members get the same.
        members_per_forward: members evaluated at once; 0 is all. A bound keeps activations in cache and memory, and
            below each device's share it makes scores equal to the bit, whatever the number of devices.
        devices: devices to share the members among; ``None`` is one. Only fitness is gathered.
        low_rank: false is ES with dense noise, to compare with.
        materialize: path patterns of parameters that may be materialized where a primitive has no rule.

    Example:
        >>> config = ESConfig(population_size=64, lr=0.5)
        >>> strategy = Strategy(lambda params, x: -jnp.sum((params["w"] - x) ** 2), config)
        >>> state = strategy.init({"w": jnp.zeros((4, 4))})
        >>> for _ in range(3):
        ...     state, fitness = strategy.step(state, jnp.ones((4, 4)))
        >>> fitness.shape
        (64,)
    """

    def __init__(
        self,
        fitness: Callable[[PyTree, PyTree], Float[ArrayLike, ""]],
        config: ESConfig,
        *,
        optimizer: optax.GradientTransformation | None = None,
        x_per_member: bool = False,
        members_per_forward: int = 0,
        devices: Sequence[Any] | None = None,
        low_rank: bool = True,
        materialize: Sequence[str] = (),
    ) -> None:
        self.config, self.x_per_member, self.members_per_forward = config, x_per_member, members_per_forward
        if optimizer is not None and config.anchored_weight_decay:
            optimizer = optax.chain(towards_start(config.anchored_weight_decay), optimizer)
        self._scheduled = optimizer is None
        self.optimizer = optimizer or optimizer_for(config)
        self.apply = Perturbed(
            fitness, config.noise, include=config.target_modules, exclude=config.exclude, materialize=materialize,
            low_rank=low_rank,
        )  # fmt: skip
        self.num_draws = config.noise.num_draws(config.population_size)
        self.mesh = self._mesh(devices)
        self._evaluate = jax.jit(self._evaluate_all)
        self._tell = jax.jit(self._update)
        self._step = jax.jit(self._generation)

    def _mesh(self, devices: Sequence[Any] | None) -> Mesh | None:
        if devices is None or len(devices) < 2:
            return None
        if self.num_draws % len(devices):
            unit = "pairs" if self.config.antithetic else "members"
            step = len(devices) * len(self.config.noise.signs)
            low = self.config.population_size // step * step
            raise ConfigError(
                f"population_size (={self.config.population_size}) makes {self.num_draws} {unit}, which {len(devices)} "
                f"devices cannot share evenly; use {f'{low} or {low + step}' if low else step}, or fewer devices"
            )
        return Mesh(np.array(devices), ("members",))

    def init(self, params: PyTree[Array]) -> State:
        """The state before the first generation, with a fresh optimizer."""
        arrays = _arrays(params)
        masters = {name: value.astype(jnp.float32) for name, value in arrays.items() if value.dtype.itemsize < 4}
        return State(params, self.optimizer.init(arrays | masters), jnp.int32(0), masters)

    def ask(self, state: State, sigma: Float[ArrayLike, ""] | None = None) -> Address:
        """The addresses of this generation's members, arrays ``(N,)``; ``strategy.apply`` evaluates one of them."""
        size = self.config.population_size
        generation = jnp.broadcast_to(state.generation, (size,))
        sigmas = jnp.full((size,), self._sigma(state.generation) if sigma is None else sigma, jnp.float32)
        return Address(generation, jnp.arange(size, dtype=jnp.int32), sigmas)

    def evaluate(self, state: State, x: PyTree, sigma: Float[ArrayLike, ""] | None = None) -> Float32[Array, " N"]:
        """``(N,)`` scores of this generation's members, one compiled call; noise is drawn once for each pair."""
        return self._evaluate(state, x, self._sigma(state.generation) if sigma is None else sigma)

    def tell(
        self,
        state: State,
        fitness: Float[ArrayLike, " N"],
        *,
        shaped: bool = False,
        lr: Float[ArrayLike, ""] | None = None,
    ) -> State:
        """The state after an update from ``(N,)`` scores (or weights that are ``shaped`` already)."""
        fitness = jnp.asarray(fitness, jnp.float32)
        if fitness.shape != (self.config.population_size,):
            raise ConfigError(
                f"fitness has shape {fitness.shape}; tell needs one score for each of the "
                f"{self.config.population_size} members, in their order"
            )
        weights = fitness if shaped else self.config.shape(fitness)
        return self._tell(state, weights, self._lr(state.generation) if lr is None else lr)

    def step(self, state: State, x: PyTree) -> tuple[State, Float32[Array, " N"]]:
        """One generation as one compiled call: the next state and the members' ``(N,)`` scores."""
        return self._step(state, x, self._sigma(state.generation), self._lr(state.generation))

    def leaves(self, params: PyTree, x: PyTree) -> list[Leaf]:
        """What is evolved, and how."""
        one = jax.tree.map(lambda value: value[0], x) if self.x_per_member else x
        return self.apply.leaves(params, one)

    def _sigma(self, generation: Int32[Array, ""]) -> Float32[Array, ""]:
        return jnp.float32(self.config.sigma_at(int(generation)))

    def _lr(self, generation: Int32[Array, ""]) -> Float32[Array, ""]:
        return jnp.float32(self.config.lr_at(int(generation)))

    def _generation(self, state: State, x: PyTree, sigma: Array, lr: Array) -> tuple[State, Array]:
        fitness = self._evaluate_all(state, x, sigma)
        return self._update(state, self.config.shape(fitness), lr), fitness

    def spread(self, evaluate: Callable[..., Any], *, shared_out: Sequence[int] = ()) -> Callable[..., Any]:
        """``evaluate(*arguments, draws)`` over all draws, shared among the devices; results are gathered.

        Args:
            evaluate: every output needs a first axis of draws, or of equal parts of them.
            shared_out: which arguments have a first axis of draws too; of the others every device gets the whole.
        """
        draws = jnp.arange(self.num_draws, dtype=jnp.int32)
        if self.mesh is None:
            return lambda *arguments: evaluate(*arguments, draws)
        mesh, spread, everywhere = self.mesh, PartitionSpec("members"), PartitionSpec()

        def run(*arguments: Any) -> Any:
            specs = (*(spread if i in shared_out else everywhere for i in range(len(arguments))), spread)
            shared = jax.shard_map(evaluate, mesh=mesh, in_specs=specs, out_specs=spread, check_vma=False)
            gathered = jax.NamedSharding(mesh, everywhere)
            results = shared(*arguments, draws)
            return jax.tree.map(lambda value: jax.lax.with_sharding_constraint(value, gathered), results)

        return run

    def _evaluate_all(self, state: State, x: PyTree, sigma: Array) -> Float32[Array, " N"]:
        if self.x_per_member:
            signs = len(self.config.noise.signs)
            x = jax.tree.map(lambda value: value.reshape(self.num_draws, signs, *value.shape[1:]), x)
        evaluate = self.spread(self._evaluate_draws, shared_out=(1,) if self.x_per_member else ())
        return evaluate(state, x, sigma).reshape(-1)

    def _evaluate_draws(
        self, state: State, x: PyTree, sigma: Array, draws: Int32[Array, " K"]
    ) -> Float32[Array, "K signs"]:
        """``(draws, signs)`` scores of some draws of this generation."""
        first = jax.tree.map(lambda value: value[0, 0], x) if self.x_per_member else x
        leaves = self.apply.leaves(state.params, first)
        signs = jnp.array(self.config.noise.signs, jnp.float32)

        def pair(arguments: tuple[Any, Any]) -> Any:
            number, own = arguments
            drawn = draw_pairs(self.config.noise, leaves, state.generation, number[None])
            noise = jax.tree.map(lambda value: value[0], drawn)

            def member(sign: Any, x: Any) -> Any:
                return _one_number(self.apply(state.params, x, MemberNoise(noise, sigma * sign)))

            return jax.vmap(member, in_axes=(0, 0 if self.x_per_member else None))(
                signs, own if self.x_per_member else x
            )

        arguments = (draws, x if self.x_per_member else draws)
        at_once = max(1, self.members_per_forward // len(signs)) if self.members_per_forward else len(draws)
        if at_once >= len(draws):
            return jax.vmap(pair)(arguments)
        return jax.lax.map(pair, arguments, batch_size=at_once)

    def _update(self, state: State, weights: Float32[Array, " N"], lr: Array) -> State:
        leaves = self.apply.known_leaves(state.params)
        gradient = es_gradient(self.config.noise, leaves, weights, state.generation)
        arrays = _arrays(state.params)
        exact = arrays | state.masters
        # Optimizers minimize; parameters that are not evolved have no gradient and stay as they are.
        descent = {
            name: -gradient[name].astype(value.dtype) if name in gradient else jnp.zeros_like(value)
            for name, value in exact.items()
        }
        steps, opt_state = self.optimizer.update(descent, state.opt_state, exact)
        scale = lr if self._scheduled else 1.0
        new = {
            name: value + (scale * steps[name]).astype(value.dtype) if name in gradient else value
            for name, value in exact.items()
        }
        masters = {name: new[name] for name in state.masters}
        rounded = {name: new[name].astype(value.dtype) for name, value in arrays.items()}
        return State(_replaced(state.params, rounded), opt_state, state.generation + 1, masters)


def _one_number(score: Any) -> Float32[Array, ""]:
    """A fitness function's result as a float32 scalar.

    Raises:
        ConfigError: it is something else than one real number.
    """
    what = None
    if isinstance(score, (tuple, list, dict)):
        what = f"a {type(score).__name__} of {len(score)}"
    elif not isinstance(score, (jax.Array, np.ndarray, np.generic, int, float)):
        what = f"{type(score).__name__}"
    elif jnp.shape(score) != ():
        what = f"shape {jnp.shape(score)}"
    elif jnp.iscomplexobj(score):
        what = f"the dtype {jnp.asarray(score).dtype}"
    if what is not None:
        raise ConfigError(
            f"the fitness function gave {what}; it must give one number. Return the score alone: a function that "
            "returns (score, aux) is lambda params, x: function(params, x)[0] here"
        )
    return jnp.asarray(score).astype(jnp.float32)


def _arrays(params: PyTree) -> dict[str, Array]:
    """The arrays of a pytree by path: what the optimizer sees."""
    return {name: value for name, value in named_leaves(params).items() if jnp.issubdtype(value.dtype, jnp.floating)}


def _replaced(params: PyTree, new: dict[str, Array]) -> PyTree:
    """The pytree with the arrays of ``new`` in their places."""
    flat, structure = jax.tree_util.tree_flatten(params)
    names = iter(named_leaves(params))
    values = []
    for value in flat:
        name = next(names) if hasattr(value, "shape") and hasattr(value, "dtype") else None
        values.append(new.get(name, value) if name is not None else value)
    return jax.tree_util.tree_unflatten(structure, values)
