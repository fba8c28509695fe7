"""Normals per second of every version of the noise, next to torch.randn in the same process.

    python benchmarks/bench_noise.py [--threads N] [--turns 9] [--device cuda]

One measurement of each version in turn, and again, so that all of them see the same disturbances.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import numpy as np
import torch

from eggroll._environment import COMPILE_NOISE
from eggroll.torch import threefry
from eggroll.torch.kernels import threefry_c

MEASURE = "float32 normals per second / those of torch.randn"
TARGETS = {"plain operations": 0.4, "C": 1.0, "GPU": 1.0}
SHAPES = {
    "one draw": (1, 1 << 22),
    "16 draws of 1152": (16, 1152),
    "4096 draws of 1152": (4096, 1152),
    "4096 draws of 64": (4096, 64),
}
RANDN = "torch.randn"


def versions(device: str) -> dict[str, Callable[[Any, int], Any]]:
    """Name -> function that draws ``(K, count)``, each with its own setting of the environment."""

    def drawer(setting: str) -> Callable[[Any, int], Any]:
        def draw(keys: Any, count: int) -> Any:
            os.environ[COMPILE_NOISE] = setting
            return threefry.normals(keys, count, device=device)

        return draw

    if torch.device(device).type == "cuda":
        return {"GPU": drawer("")}
    compiled = {} if threefry_c.why_not() else {"C": drawer("1")}
    return {"plain operations": drawer("0"), **compiled}


def measure(shape: tuple[int, int], device: str, turns: int) -> common.Times:
    """Seconds per call of torch.randn and of each version; of short calls, the best of a few in each turn."""
    num_keys, count = shape
    keys = np.random.default_rng(0).integers(0, 2**32, (num_keys, 2), dtype=np.uint32)
    calls: dict[str, Callable[[], Any]] = {RANDN: lambda: torch.randn(num_keys, count, device=device)}
    calls |= {name: partial(draw, keys, count) for name, draw in versions(device).items()}
    inner = max(1, (1 << 20) // (num_keys * count))

    def best(call: Callable[[], Any]) -> float:
        return min(common.seconds(call, device) for _ in range(inner))

    return common.alternate({name: partial(best, call) for name, call in calls.items()}, turns=turns)


def main() -> None:
    args = common.begin(common.parser(__doc__, turns=9, model=False))
    rows = []
    for label, shape in SHAPES.items():
        if args.quick:
            label, shape = f"{label} (smaller)", (min(shape[0], 1024), min(shape[1], 1 << 20))
        times = measure(shape, args.device, args.turns)
        for name in list(times)[1:]:
            taken = {RANDN: times[RANDN], "version": times[name]}
            figure = common.ratio(taken, RANDN, "version")
            rate = shape[0] * shape[1] / common.spread(times[name])["median"]
            case = f"{label}, {name}"
            rows.append(common.row(case, figure, target=TARGETS[name], seconds=taken, normals_per_second=rate))
    common.finish("noise", MEASURE, rows, args, shapes=SHAPES)


if __name__ == "__main__":
    main()
