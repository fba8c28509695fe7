"""The integer model: evaluation's share of the machine's int8 rate, the update's share of evaluation, and memory.

    python benchmarks/bench_pretrain.py [--threads N] [--turns 7] [--layers 6] [--hidden 256] [--members 768]
    python benchmarks/bench_pretrain.py --device cuda --members 262144

In each turn the int8 products of PyTorch and of the kernel run at several shapes, and the best rate of the turn is what
evaluation is compared with: tokens per second times the multiply-adds of a token (without head and low-rank terms).
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import common
import numpy as np
import torch

from eggroll.pretrain.engines import library
from eggroll.pretrain.engines.base import Backend, run_center, run_members
from eggroll.pretrain.engines.choose import make_engine
from eggroll.pretrain.model.fixed_point import divisor
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.oracle import init_params
from eggroll.pretrain.model.shape import ModelShape
from eggroll.pretrain.update import make_step

MEASURE = "evaluation's multiply-adds per second / the best int8 product's in the same turn"
UPDATE_MEASURE = "seconds of an update / seconds of the evaluation before it"
TARGET, UPDATE_TARGET = 0.35, 0.10
GEMM_SHAPES = ((192, 1024, 1024), (1536, 1024, 1024), (1536, 256, 1024), (1536, 1024, 256))
"""Rows, inputs, outputs."""
CUDA_SHAPES = ((8192, 8192, 8192), (32768, 1024, 1024), (32768, 256, 1024), (32768, 1024, 256))
REPEATS = 6


class Gemm:
    """Int8 products at full speed: each gives its multiply-adds per second."""

    def __init__(self, threads: int, device: str) -> None:
        self.threads, self.pool, self.device = threads, ThreadPoolExecutor(threads), device
        self.library = library.load() if device == "cpu" else "the kernel is for CPUs"
        self.rng, self.kept = np.random.default_rng(0), list[Any]()

    def rates(self) -> dict[str, Callable[[], float]]:
        """Name -> measurement."""
        made: dict[str, Callable[[], float]] = {}
        for shape in GEMM_SHAPES if self.device == "cpu" else CUDA_SHAPES:
            name = "x".join(map(str, shape))
            made[f"torch._int_mm {name}"] = partial(self._rate, shape, self._torch(*shape), 1)
            if not isinstance(self.library, str):
                made[f"kernel {name}"] = partial(self._rate, shape, self._kernel(*shape), self.threads)
        return made

    def _rate(self, shape: tuple[int, int, int], run: Callable[[], None], times: int) -> float:
        best = min(common.seconds(run, self.device) for _ in range(REPEATS))
        return float(np.prod(shape)) * times / best

    def _torch(self, rows: int, inputs: int, outputs: int) -> Callable[[], None]:
        x, w = (torch.from_numpy(self._bytes(n, inputs)).to(self.device) for n in (rows, outputs))

        def run() -> None:
            torch._int_mm(x, w.T)

        return run

    def _kernel(self, rows: int, inputs: int, outputs: int) -> Callable[[], None]:
        """Every thread has rows of its own; the weights are shared."""
        assert not isinstance(self.library, str)
        packed, start = library.packed_matrix(self.library, self._bytes(outputs, inputs))
        matrix = library.Matrix(
            library.address(packed), library.address(start), inputs, outputs, divisor(inputs), 8, 0, 0
        )
        ins = [self._bytes(rows, inputs) for _ in range(self.threads)]
        outs = [np.empty((rows, outputs), np.int8) for _ in range(self.threads)]
        self.kept += [packed, start]  # the library reads them where they are

        def one(thread: int) -> None:
            self.library.eggroll_multiply(
                ctypes.byref(matrix), library.address(ins[thread]), library.address(outs[thread]), rows
            )

        def run() -> None:
            list(self.pool.map(one, range(self.threads)))

        return run

    def _bytes(self, *shape: int) -> Any:
        return self.rng.integers(-127, 128, shape).astype(np.int8)


def population(
    shape: ModelShape, noise: Noise, members: int, steps: int, backend: Backend, device: str
) -> dict[str, Any]:
    """An engine, and calls that evaluate all its members, the model itself on as many rows, and update."""
    engine = make_engine(init_params(shape), noise, backend=backend, device=device)
    if backend == "torch" and hasattr(engine, "fused"):
        engine.fused = False  # of the two ways that there are on CUDA, the plain one
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 256, (members, steps + 1)).astype(np.uint8)
    numbers, pairs = np.arange(members), np.arange(members // 2)
    weights = (16 * (2 * rng.integers(0, 2, members // 2) - 1)).astype(np.int8)
    step = make_step(weights, 0.05, noise.rank)
    return {
        "evaluate": lambda: run_members(engine, 1, numbers, tokens, numbers),
        "center": lambda: run_center(engine, tokens, outputs=("fitness",)),
        "update": lambda: engine.update(1, pairs, weights, step),
    }


def main() -> None:
    """Measure, print and write the results."""
    parser = common.parser(__doc__, model=False)
    parser.add_argument("--layers", type=int, default=6, help="blocks of the model")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model")
    parser.add_argument("--members", type=int, help="members of the population (default 768)")
    parser.add_argument("--steps", type=int, default=32, help="tokens of a member (default 32)")
    args = common.begin(parser, members=768)
    if args.quick:
        args.layers, args.hidden, args.steps = 1, 64, 4
    shape, tokens = ModelShape(256, args.hidden, args.layers), args.members * args.steps
    if args.device == "cpu" and isinstance(library.load(), str):
        print(f"note: the C library cannot be used here: {library.load()}")
    gemm = Gemm(torch.get_num_threads(), args.device).rates()
    best = lambda: max(measure() for measure in gemm.values())  # noqa: E731
    for name, measure in gemm.items():
        print(f"{name}: {measure() / 1e9:.1f} G multiply-adds/s")
    cases: dict[str, tuple[Noise, Backend]] = {
        "rank 1, table": (Noise(), "auto"),
        "rank 1, counter": (Noise(kind="counter"), "auto"),
        "rank 2, table": (Noise(rank=2), "auto"),
        "rank 1, table, plain PyTorch": (Noise(), "torch"),
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows, updates = [], []
    for case, (noise, backend) in cases.items():
        calls = population(shape, noise, args.members, args.steps, backend, args.device)
        turns = 2 if backend == "torch" else args.turns
        times = common.alternate(
            {"gemm": best, **{name: partial(common.seconds, call, args.device) for name, call in calls.items()}},
            turns=turns,
        )
        rates = {name: [tokens * shape.macs / s for s in times[name]] for name in ("evaluate", "center")}
        found = common.ratio({"evaluate": rates["evaluate"], "gemm": times["gemm"]}, "evaluate", "gemm")
        of_center = common.ratio({"center": rates["center"], "gemm": times["gemm"]}, "center", "gemm")
        target = TARGET if case == "rank 1, table" else None
        facts = {
            "tokens_per_s": common.spread([tokens / s for s in times["evaluate"]]),
            "gemm_macs_per_s": common.spread(times["gemm"]),
            "model_itself_ratio": of_center,
        }
        rows.append(common.row(f"evaluate: {case}", found, target=target, **facts))
        share = common.ratio(times, "update", "evaluate")
        goal = UPDATE_TARGET if target else None
        updates.append(common.row(f"update: {case}", share, target=goal, lower_is_better=True))
        common.say(rows[-1])
        print(f"  {facts['tokens_per_s']['median']:,.0f} tokens/s; the model itself, without noise: "
              f"{of_center['median']:.3f}; GEMM {facts['gemm_macs_per_s']['median'] / 1e9:.0f} G/s")  # fmt: skip
        common.say(updates[-1])
        if case == "rank 1, table":
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            print(f"  peak memory above the interpreter's: {used / 2**10:,.0f} MiB")
            rows[-1]["peak_memory_mib"] = round(used / 2**10, 1)
    common.finish(
        "pretrain", f"{MEASURE}; {UPDATE_MEASURE}", [*rows, *updates], args, layers=args.layers, hidden=args.hidden,
        members=args.members, steps=args.steps, multiply_adds_per_token=shape.macs,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
