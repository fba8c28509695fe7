"""profile: where the time of a generation goes, part by part, beside plain inference over the same rows.

    eggroll recipe profile [--population 2048] [--batch 64] [--width 256] [--rank 1]

A perceptron with three layers of one width, through the functional API and through Population (the unmodified module);
medians of several generations, in turns with plain inference; where JAX is installed, its path side by side, members
in parts whose activations stay in cache. On a CPU each framework has its own threads, so that they are timed apart.

Expected: plain inference / population forward about 0.95 on two cores (AMD EPYC); benchmarks/bench_functional.py
makes the figures that are claims.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from eggroll.core.check import whole
from eggroll.errors import ConfigError
from eggroll.recipes.common import console, program
from eggroll.torch import Population
from eggroll.torch import functional as f

PLAIN = "plain inference, same rows"
AT_ONCE = 32
"""Members whose activations JAX has at once; see benchmarks/bench_jax.py."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Time by part."""

    population: int = 2048
    """Members."""
    batch: int = 64
    """Rows of each member."""
    width: int = 256
    """Inputs and outputs of each of the three layers."""
    rank: int = 1
    """Rank of the perturbations."""
    turns: int = 7
    """Generations that are measured."""
    device: str = "cpu"
    """cpu or cuda."""

    def __post_init__(self) -> None:
        problems = whole(self, population=2, batch=1, width=1, rank=1, turns=1)
        if problems:
            raise ConfigError.from_problems(type(self).__name__, problems)


OPTIONS = ProfileOptions


def run(options: ProfileOptions) -> dict[str, float]:
    """Measure the parts of a generation; returns medians in seconds."""
    place, size, width = torch.device(options.device), options.population, options.width
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())))
    model = model.eval().to(place)
    params = f.get_params_dict(model)
    shapes = f.get_weight_shapes(params)
    population = Population(model, population_size=size, rank=options.rank)
    x = torch.randn(size, options.batch, width, device=place)
    rows, fitness = x.flatten(0, 1), torch.randn(size, device=place)

    def draw() -> f.Perturbations:
        return f.generate_perturbations(shapes, size, options.rank, 0.05, f.NoiseKey(0), device=place)

    perts = draw()

    def forward() -> Tensor:
        h = x
        for key in params:
            h = torch.relu(f.perturbed_forward(h, params[key], None, perts, key))
        return h

    def module_forward() -> Tensor:
        with population.perturbed(0):
            return model(rows)

    population.prepare(0)
    shaped = f.normalize_fitnesses(fitness)
    parts: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: model(rows),
        "draw noise (by address)": draw,
        "forward, functional API": forward,
        "forward, Population": module_forward,
        "shape fitness": lambda: f.normalize_fitnesses(fitness),
        "gradients": lambda: f.compute_gradients(shaped, perts, size),
        "update": lambda: f.update_params(params, {k: torch.zeros(s, device=place) for k, s in shapes.items()}, 0.1),
    }
    with torch.no_grad():
        medians = _medians(parts, options.turns, place)
    if importlib.util.find_spec("jax") is not None:
        medians |= {f"JAX: {part}": seconds for part, seconds in jax_medians(options).items()}
    plain = medians[PLAIN]
    table = Table(
        title=f"{size} members x {options.batch} rows, 3 x {width}, rank {options.rank}", title_justify="left"
    )
    for column in ("part", "ms", "of plain inference"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, seconds in medians.items():
        beside = medians[f"JAX: {PLAIN}"] if part.startswith("JAX") else plain
        table.add_row(part, f"{seconds * 1e3:.2f}", f"{seconds / beside:.1%}")
    console.print(table)
    whole = sum(medians[part] for part in parts if part not in (PLAIN, "forward, Population"))
    console.print(f"plain inference / population forward  [bold]{plain / medians['forward, functional API']:.3f}[/]")
    console.print(f"plain inference / whole generation    [bold]{plain / whole:.3f}[/]")
    console.print(f"members per second, whole generation  [bold]{size / whole:,.0f}[/]")
    return medians


def jax_medians(options: ProfileOptions) -> dict[str, float]:
    """The same parts through ``eggroll.jax``, each one compiled call; medians in seconds."""
    import jax
    import jax.numpy as jnp

    from eggroll.jax.gradient import es_gradient
    from eggroll.jax.noise import draw_pairs
    from eggroll.jax.perturbed import MemberNoise, perturb

    size, width = options.population, options.width
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[1:]]
    x = jax.random.normal(keys[0], (size // 2, 2, options.batch, width))

    def network(params: Any, x: Any) -> Any:
        for weight in params:
            x = jax.nn.relu(x @ weight)
        return x

    apply = perturb(network, rank=options.rank)
    leaves = apply.leaves(params, x[0, 0])
    pairs, scales = jnp.arange(size // 2), jnp.array([0.05, -0.05])

    def pair(x: Any, noise: Any) -> Any:
        return jax.vmap(lambda scale, rows: apply(params, rows, MemberNoise(noise, scale)))(scales, x)

    in_parts = {"batch_size": max(1, AT_ONCE // 2)}
    draw = jax.jit(lambda: draw_pairs(apply.noise, leaves, 0, pairs))
    forward = jax.jit(lambda x, noise: jax.lax.map(lambda part: pair(*part), (x, noise), **in_parts))
    plain = jax.jit(lambda x: jax.lax.map(lambda rows: network(params, rows), x, **in_parts))
    gradients = jax.jit(lambda shaped: es_gradient(apply.noise, leaves, shaped, 0))
    drawn, shaped = draw(), jnp.ones(size)
    parts: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: jax.block_until_ready(plain(x)),
        "draw noise (by address)": lambda: jax.block_until_ready(draw()),
        "forward, perturb": lambda: jax.block_until_ready(forward(x, drawn)),
        "gradients (draws again)": lambda: jax.block_until_ready(gradients(shaped)),
    }
    return _medians(parts, options.turns, torch.device("cpu"))


def _medians(parts: dict[str, Callable[[], Any]], turns: int, place: torch.device) -> dict[str, float]:
    measured: dict[str, list[float]] = {part: [] for part in parts}
    for turn in range(turns + 1):  # the first is a warm-up
        for part, function in parts.items():
            start = time.perf_counter()
            function()
            if place.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                measured[part].append(time.perf_counter() - start)
    return {part: statistics.median(values) for part, values in measured.items()}


if __name__ == "__main__":
    program("profile")
