"""An unmodified Equinox module, evolved on accuracy: do a point's two signs agree?

    python examples/equinox_module.py     about a minute, most of it compilation; needs the extra `jax` and equinox

``Strategy`` evolves any pytree of arrays and takes any function that JAX can trace. What is no array in the module (its
activation function) is split off and put back inside the fitness function. Accuracy is measured on new points.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

from eggroll import ESConfig
from eggroll.jax import Strategy


def points(seed: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Points ``(count, 2)``, and whether their two coordinates have the same sign."""
    xy = jax.random.normal(jax.random.key(seed), (count, 2))
    return xy, xy[:, 0] * xy[:, 1] > 0


def main(generations: int = 100, population_size: int = 64) -> tuple[float, float]:
    """Returns the accuracy on 2,000 new points, before and after."""
    model = eqx.nn.MLP(2, 1, width_size=16, depth=1, activation=jax.nn.relu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def accuracy(params, batch):
        xy, same = batch
        return ((jax.vmap(eqx.combine(params, static))(xy)[:, 0] > 0) == same).mean()

    config = ESConfig(population_size=population_size, rank=1, sigma=0.3, lr=0.1, optimizer="adam", seed=0)
    strategy = Strategy(accuracy, config)
    state = strategy.init(params)
    new = points(seed=10**6, count=2000)
    before = float(accuracy(state.params, new))
    for generation in range(generations):
        state, _ = strategy.step(state, points(seed=generation, count=256))
    after = float(accuracy(state.params, new))
    trained = eqx.combine(state.params, static)  # an ordinary module again
    agree, differ = (float(trained(jnp.array(xy))[0]) for xy in ((1.0, 1.0), (1.0, -1.0)))
    print(f"accuracy on new points: {before:.2f} before, {after:.2f} after {generations} generations")
    print(f"output at (1, 1): {agree:+.2f}, at (1, -1): {differ:+.2f}")
    return before, after


if __name__ == "__main__":
    main()
