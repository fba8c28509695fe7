"""An unmodified Equinox module, evolved on accuracy: is a point inside the ring?

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
    """Points ``(count, 2)``, and whether their distance from the origin is between 0.7 and 1.3."""
    xy = jax.random.uniform(jax.random.key(seed), (count, 2), minval=-1.6, maxval=1.6)
    radius = jnp.linalg.norm(xy, axis=1)
    return xy, (radius > 0.7) & (radius < 1.3)


def main(generations: int = 150, population_size: int = 256) -> tuple[float, float]:
    """Returns the accuracy on 2,000 new points, before and after."""
    model = eqx.nn.MLP(2, 1, width_size=32, depth=2, activation=jax.nn.relu, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def accuracy(params, batch):
        xy, inside = batch
        return ((jax.vmap(eqx.combine(params, static))(xy)[:, 0] > 0) == inside).mean()

    config = ESConfig(population_size=population_size, rank=1, sigma=0.1, lr=0.02, optimizer="adam", seed=0)
    strategy = Strategy(accuracy, config)
    state = strategy.init(params)
    new = points(seed=10**6, count=2000)
    before = float(accuracy(state.params, new))
    for generation in range(generations):
        state, _ = strategy.step(state, points(seed=generation, count=128))
    after = float(accuracy(state.params, new))
    trained = eqx.combine(state.params, static)  # an ordinary module again
    inside, outside = (float(trained(jnp.array(xy))[0]) for xy in ((1.0, 0.0), (0.0, 0.0)))
    print(f"accuracy on new points: {before:.2f} before, {after:.2f} after {generations} generations")
    print(f"output on the ring {inside:+.2f}, in its center {outside:+.2f}")
    return before, after


if __name__ == "__main__":
    main()
