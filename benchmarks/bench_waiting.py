"""How threads wait (spinning, or asleep): decoding with SmolLM2 alone, and beside a second run of the same.

    python benchmarks/bench_waiting.py [--turns 5]

Each figure is a process of its own (32 rows, float32, a token for each row), as OpenMP reads its variables once. The
ratio is time with PyTorch's default, alone, over the time with the setting: 1 is as fast as an undisturbed default.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from functools import partial

import common

from eggroll._environment import WAITING

MEASURE = "time of a decoding step with default waiting, alone / with the setting, the same step"
ASLEEP = {**WAITING, "GOMP_SPINCOUNT": "0"}
SETTINGS: dict[str, Mapping[str, str]] = {"default": {}, "eggroll's": WAITING, "asleep at once": ASLEEP}
STEP = """
import time, torch
from eggroll import llm
model = llm.load("{model}", dtype="float32").model
ids = torch.randint(1, min(1000, model.config.vocab_size), (32, 16))
with torch.no_grad():
    cache, taken = model(ids, use_cache=True).past_key_values, []
    for _ in range({steps}):
        start = time.perf_counter()
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        taken.append(time.perf_counter() - start)
print(sorted(taken)[len(taken) // 2])
"""


def seconds(setting: Mapping[str, str], runs: int, model: str, steps: int) -> float:
    """A decoding step's time, the mean of ``runs`` processes side by side."""
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    program = [sys.executable, "-c", STEP.format(model=model, steps=steps)]
    started = [
        subprocess.Popen(program, env={**kept, **setting}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(runs)
    ]
    return statistics.mean(float(process.communicate()[0].split()[-1]) for process in started)


def main() -> None:
    made = common.parser(__doc__, turns=5, model=False)
    made.add_argument("--model", default=common.MODEL, help="alias, directory or hub id")
    args = common.begin(made)
    steps = 2 if args.quick else 15
    variants = {
        f"{name}, {('alone', 'two side by side')[runs - 1]}": partial(seconds, setting, runs, args.model, steps)
        for name, setting in SETTINGS.items()
        for runs in (1, 2)
    }
    times = common.alternate(variants, turns=args.turns, warm_up=0)
    rows = [
        common.row(name, common.ratio(times, "default, alone", name), seconds={"step": measured})
        for name, measured in times.items()
    ]
    common.finish("waiting", MEASURE, rows, args)


if __name__ == "__main__":
    main()
