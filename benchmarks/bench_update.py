"""One update (estimate, step, rounding) with SGD and with Adam: the step in PyTorch's operations, and in C.

    python benchmarks/bench_update.py [--members 32] [--turns 9]

All matrices of the model; in 16 bits they have float32 masters. Both ways give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count
from typing import Any

import common
import numpy as np
import torch

from eggroll import ESConfig, llm
from eggroll.torch import Replica
from eggroll.torch.kernels import adam_c, step_c
from eggroll.torch.replica import MATRIX_KINDS

MEASURE = "time of an update whose step is taken by PyTorch's operations / in C"


@contextlib.contextmanager
def left_to_pytorch() -> Iterator[None]:
    """Inside the block, no step is taken in C."""
    entry, agrees = step_c._entry, adam_c._agrees
    step_c._entry, adam_c._agrees = lambda: "left out", lambda: False
    try:
        yield
    finally:
        step_c._entry, adam_c._agrees = entry, agrees


def alternate(model: Any, optimizer: str, args: Any) -> dict[str, list[float]]:
    """Seconds of updates of a model with an optimizer, both ways in turns."""
    config = ESConfig(population_size=args.members, rank=1, sigma=0.01, lr=1e-4, optimizer=optimizer)
    replica, numbers = Replica(model, config, kinds=MATRIX_KINDS), count()
    weights = np.random.default_rng(0).standard_normal(args.members).astype(np.float32)

    def seconds() -> float:
        generation = next(numbers)
        replica.population.prepare(generation)  # the noise of the members is drawn by then
        return common.seconds(lambda: replica.update(generation, weights, config.lr))

    def plain() -> float:
        with left_to_pytorch():
            return seconds()

    seconds()  # Adam's state is made in the first step
    return common.alternate({"PyTorch": plain, "C": seconds}, turns=args.turns)


@torch.no_grad()
def main() -> None:
    args = common.begin(common.parser(__doc__, turns=9), members=32)
    for part in (step_c, adam_c):
        if (reason := part.why_not()) is not None:
            raise SystemExit(f"nothing to compare: {reason}")
    rows = []
    for dtype in args.dtypes:
        model: Any = llm.load(args.model, dtype=dtype).model
        for optimizer in ("sgd", "adam"):
            times = alternate(model, optimizer, args)
            case = f"{args.members} members, rank 1, {optimizer}, {dtype}"
            rows.append(common.row(case, common.ratio(times, "PyTorch", "C"), seconds=times))
            common.say(rows[-1])
    common.finish("update", MEASURE, rows, args, model=args.model, members=args.members, rank=1)


if __name__ == "__main__":
    main()
