"""One update with plain SGD (estimate, step, rounding): the step in PyTorch's operations, and in one pass in C.

    python benchmarks/bench_update.py [--members 32] [--turns 9]

All matrices of the model; in 16 bits they have float32 masters. Both ways give the same bits.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import common
import numpy as np
import torch

from eggroll import ESConfig, llm
from eggroll.torch import Replica
from eggroll.torch.kernels import step_c
from eggroll.torch.replica import MATRIX_KINDS

MEASURE = "time of an update whose step is taken by PyTorch's operations / in one pass in C"


@torch.no_grad()
def main() -> None:
    args = common.begin(common.parser(__doc__, turns=9), members=32)
    if (reason := step_c.why_not()) is not None:
        raise SystemExit(f"nothing to compare: {reason}")
    entry, rows = step_c._entry, []
    for dtype in args.dtypes:
        model: Any = llm.load(args.model, dtype=dtype).model
        config = ESConfig(population_size=args.members, rank=1, sigma=0.01, lr=1e-3)
        replica, numbers = Replica(model, config, kinds=MATRIX_KINDS), count()
        weights = np.random.default_rng(0).standard_normal(args.members).astype(np.float32)

        def seconds(found: Any, replica: Any = replica, numbers: Any = numbers, weights: Any = weights) -> float:
            generation = next(numbers)
            replica.population.prepare(generation)  # the noise of the members is drawn by then
            step_c._entry = found
            try:
                return common.seconds(lambda: replica.update(generation, weights, config.lr))  # noqa: B023
            finally:
                step_c._entry = entry

        variants = {"PyTorch": lambda: seconds(lambda: "left out"), "C": lambda: seconds(entry)}
        times = common.alternate(variants, turns=args.turns)
        case = f"{args.members} members, rank 1, {dtype}"
        rows.append(common.row(case, common.ratio(times, "PyTorch", "C"), seconds=times))
        common.say(rows[-1])
    common.finish("update", MEASURE, rows, args, model=args.model, members=args.members, rank=1)


if __name__ == "__main__":
    main()
