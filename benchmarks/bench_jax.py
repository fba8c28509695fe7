"""JAX: a population's forward beside plain inference over the same rows, noise drawn in advance; and compile times.

    python benchmarks/bench_jax.py [--turns 7] [--quick]

Layers of one width with relu between them, a transformer block (8 heads, 16 tokens) and two convolutions (3 x 3, images
of 16 x 16); every member has rows of its own. Plain inference is timed in the same turns, all rows at once and in the
same parts as the population, and a ratio is to the faster of the two. ``redrawn`` draws the noise inside every forward,
as the reference implementation does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from common import RESULTS, ROOT, hardware, slug

from eggroll.core.config import ESConfig
from eggroll.jax import Strategy
from eggroll.jax.gradient import es_gradient
from eggroll.jax.noise import draw_pairs
from eggroll.jax.perturbed import Address, MemberNoise, perturb
from eggroll.run.provenance import git_revision, versions

CASES = [  # network, members, batch, width, layers, rank, members at once, target
    ("dense", 2048, 64, 256, 3, 1, 32, 0.9),
    ("dense", 2048, 1, 256, 3, 1, 2048, 0.5),
    ("dense", 64, 64, 1024, 3, 1, 8, 0.9),
    ("dense", 2048, 64, 256, 3, 4, 32, None),
    ("dense", 2048, 1, 256, 3, 4, 2048, None),
    ("dense", 2048, 64, 256, 3, 8, 32, 0.9),
    ("dense", 2048, 1, 256, 3, 8, 2048, None),
    ("block", 64, 4, 512, 1, 1, 8, None),
    ("block", 64, 4, 512, 1, 8, 8, None),
    ("conv", 128, 8, 32, 2, 1, 16, None),
    ("conv", 128, 8, 32, 2, 8, 16, None),
]
TOKENS, HEADS, SIDE = 16, 8, 16


def dense(params: Any, x: Any) -> Any:
    """Layers with relu between them: ``(batch, width)``."""
    for weight in params:
        x = jax.nn.relu(x @ weight)
    return x


def block(params: Any, x: Any) -> Any:
    """Transformer blocks, without a mask: ``(batch, tokens, width)``."""

    def normed(x: Any, scale: Any) -> Any:
        return scale * (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    for layer in params:
        rows = normed(x, layer["attention_norm"])
        q, k, v = ((rows @ layer[name]).reshape(*x.shape[:2], HEADS, -1) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape) @ layer["o"]
        x = x + jax.nn.relu(normed(x, layer["mlp_norm"]) @ layer["up"]) @ layer["down"]
    return x


def conv(params: Any, x: Any) -> Any:
    """Convolutions with relu between them: ``(batch, side, side, width)``."""
    for kernel in params:
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
    return x


def make(name: str, batch: int, width: int, layers: int, key: Any) -> tuple[Callable[..., Any], Any, tuple[int, ...]]:
    """A network: its function, random parameters and the shape of a member's rows."""

    def matrices(count: int, *shape: int) -> list[Any]:
        fan_in = math.prod(shape[:-1])
        return [jax.random.normal(k, shape) * (2 / fan_in) ** 0.5 for k in jax.random.split(key, count)]

    if name == "dense":
        return dense, matrices(layers, width, width), (batch, width)
    if name == "conv":
        return conv, matrices(layers, 3, 3, width, width), (batch, SIDE, SIDE, width)
    params = []
    for _ in range(layers):
        square = dict(zip("qkvo", matrices(4, width, width), strict=True))
        norms = {part: jnp.ones(width) for part in ("attention_norm", "mlp_norm")}
        wide = {"up": matrices(1, width, 4 * width)[0], "down": matrices(1, 4 * width, width)[0]}
        params.append({**square, **norms, **wide})
    return block, params, (batch, TOKENS, width)


def timed(variants: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each variant, in turns of alternating order, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name in variants:
        jax.block_until_ready(variants[name]())
    for turn in range(turns):
        names = list(variants) if turn % 2 else list(reversed(variants))
        for name in names:
            began = time.perf_counter()
            jax.block_until_ready(variants[name]())
            times[name].append(time.perf_counter() - began)
    return times


def case(
    name: str, members: int, batch: int, width: int, layers: int, rank: int, at_once: int, turns: int
) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0))
    network, params, shape = make(name, batch, width, layers, keys[1])
    x = jax.random.normal(keys[0], (members // 2, 2, *shape))
    apply = perturb(network, rank=rank)
    leaves = apply.leaves(params, x[0, 0])
    draws = jax.jit(lambda: draw_pairs(apply.noise, leaves, 0, jnp.arange(members // 2)))()
    signs = jnp.array([0.1, -0.1])
    pairs = max(1, at_once // 2)

    def parts(one: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        run = jax.jit(lambda *given: jax.lax.map(lambda part: one(*part), given, batch_size=pairs).sum())
        return lambda: run(*arguments)

    def drawn(x: Any, noise: Any) -> Any:
        member = lambda scale, rows: apply(params, rows, MemberNoise(noise, scale))  # noqa: E731
        return jax.vmap(member)(signs, x).sum()

    def redrawn(x: Any, pair: Any) -> Any:
        member = lambda sign, rows: apply(params, rows, Address(0, 2 * pair + sign, 0.1))  # noqa: E731
        return jax.vmap(member)(jnp.arange(2), x).sum()

    whole = jax.jit(lambda x: network(params, x.reshape(-1, *shape[1:])).sum())
    gradient = jax.jit(lambda s: es_gradient(apply.noise, leaves, s, 0))
    shaped = jax.random.normal(keys[0], (members,))
    times = timed(
        {
            "plain": lambda: whole(x),
            "plain_in_parts": parts(lambda x: jax.vmap(lambda rows: network(params, rows))(x).sum(), x),
            "population": parts(drawn, x, draws),
            "redrawn": parts(redrawn, x, jnp.arange(members // 2)),
            "update": lambda: gradient(shaped),
        },
        turns,
    )
    plain = [min(pair) for pair in zip(times["plain"], times["plain_in_parts"], strict=True)]

    def ratio(name: str) -> dict[str, float]:
        values = [a / b for a, b in zip(plain, times[name], strict=True)]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        "network": name, "members": members, "batch": batch, "width": width, "layers": layers, "rank": rank,
        "members_at_once": at_once,
        "ratio": ratio("population"), "ratio_redrawn": ratio("redrawn"),
        "update_over_forward": statistics.median(times["update"]) / statistics.median(times["population"]),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }  # fmt: skip


def compile_seconds(layers: int, width: int) -> dict[str, float]:
    """From nothing to the first compiled generation step of a deep network, traced and compiled."""
    params = [jnp.zeros((width, width)) for _ in range(layers)]
    config = ESConfig(population_size=8, rank=1)
    strategy = Strategy(lambda params, x: dense(params, x).sum(), config)
    state = strategy.init(params)
    x = jnp.ones((4, width))
    began = time.perf_counter()
    jax.block_until_ready(strategy.step(state, x)[1])
    return {"layers": layers, "width": width, "seconds": time.perf_counter() - began, "target": 30.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, no result file: does it run?")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if options.quick:
        for name in ("dense", "block", "conv"):
            print(case(name, 8, 2, 16, 2, 1, 4, 2))
        print(compile_seconds(2, 16))
        return
    lines = []
    for *sizes, target in CASES:
        line = {**case(*sizes, options.turns), "target": target}
        lines.append(line)
        median = line["ratio"]["median"]
        print(f"{sizes}: {median:.2f} (target {target}), redrawn {line['ratio_redrawn']['median']:.2f}, "
              f"update / forward {line['update_over_forward']:.3f}", flush=True)  # fmt: skip
    compiled = compile_seconds(24, 512)
    print(f"24 layers of 512: {compiled['seconds']:.1f} s to the first generation")
    result = {
        "what": "jax", "hardware": hardware(), "device": jax.devices()[0].platform, "load_before": round(load, 2),
        "turns": options.turns, "date": str(datetime.date.today()), "revision": git_revision(ROOT),
        "versions": versions(),
        "cases": lines, "compile": compiled,
    }  # fmt: skip
    folder = RESULTS / "jax"
    folder.mkdir(exist_ok=True)
    path = folder / f"forward_{slug(hardware())}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
