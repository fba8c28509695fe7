"""A population's linear layer in one Triton kernel against plain F.linear.

    python benchmarks/bench_kernels_cuda.py [--dtypes float32 bfloat16] [--turns 9] [--graphs]

All take the same rows on one CUDA device. Results are compared with float64 before the clock starts. A measurement is
the mean of calls queued one behind the other; --graphs replays them from a CUDA graph, without what Python costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch import low_rank
from eggroll.torch.threefry import normals

MEASURE = "time of F.linear on the same rows / time of the population's layer"
PLAIN, EAGER = "F.linear", "plain operations"
FUSED, TARGET = "one kernel", 0.95
DRAWN = "plain operations, noise drawn on the fly"
PAPER = {EAGER: 0.91, DRAWN: 0.69}
"""What the paper's Figure 2a has for one layer of 8192 x 8192 in bfloat16, rank 1: inference is 1."""
SHAPES = [(2048, 1, 256, 256), (2048, 64, 256, 256), (64, 64, 4096, 4096), (64, 64, 8192, 8192)]
QUICK = [(64, 1, 64, 64), (64, 64, 64, 64)]
"""Members, rows of a member, outputs, inputs."""
RANKS = (1, 2, 4, 8)
SIGMA = 0.01
SECONDS = 0.02
"""How long a measurement is to take, about."""


class Bench:
    """One shape, rank and dtype: the calls that are compared."""

    def __init__(self, shape: Sequence[int], rank: int, dtype: torch.dtype, device: str) -> None:
        from eggroll.torch.kernels import linear_triton  # wants Triton, which --help does not

        members, batch, m, n = shape
        generator = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, generator=generator, dtype=dtype, device=device)
        self.x, self.weight, self.bias = make(members, batch, n), make(m, n) / n**0.5, make(m)
        # Antithetic pairs.
        keys = torch.randint(2**32, (members // 2, 2), generator=torch.Generator().manual_seed(rank))
        draw = torch.arange(members, device=device) // 2
        scale = (1.0 - 2.0 * (torch.arange(members, device=device) % 2)) * (SIGMA / rank**0.5)

        def factors() -> tuple[Tensor, Tensor]:
            drawn = normals(keys, (n + m) * rank, device=device).view(-1, n + m, rank)[draw]
            return (drawn[:, n:] * scale[:, None, None]).to(dtype), drawn[:, :n].to(dtype)

        self.a, self.b = factors()
        rows = self.x.view(-1, n)
        u, v = self.a.mT.contiguous(), self.b.mT.contiguous()
        self.calls: dict[str, Callable[[], Tensor]] = {
            PLAIN: partial(F.linear, rows, self.weight, self.bias),
            EAGER: partial(low_rank.linear, rows, self.weight, self.a, self.b, self.bias),
            DRAWN: lambda: low_rank.linear(rows, self.weight, *factors(), self.bias),
            FUSED: partial(linear_triton.linear, self.x, self.weight, u, v, self.bias),
        }

    def check(self) -> None:
        """Stop unless the kernel errs at most twice as much as plain operations, on some members against float64."""
        some = [0, 1, len(self.x) // 2, len(self.x) - 1]
        x, a, b = (tensor[some].double() for tensor in (self.x, self.a, self.b))
        exact = x @ (self.weight.double() + a @ b.mT).mT + self.bias.double()
        # Sums of float32 may always have some rounding: 6e-8 at each of n additions, with either sign.
        floor = 6e-8 * self.x.shape[-1] ** 0.5 * exact.abs().max().item()

        def error(name: str) -> float:
            return (self.calls[name]().view(*self.x.shape[:2], -1)[some].double() - exact).abs().max().item()

        allowed = 2 * error(EAGER) + floor
        if not (found := error(FUSED)) <= allowed:
            raise SystemExit(f"{FUSED}: results are wrong by {found:.3g}, and at most {allowed:.3g} is allowed")


def repeated(call: Callable[[], Tensor], device: str, graphs: bool) -> tuple[Callable[[], Any], int]:
    """A function that makes a call so often that it can be timed, and how often that is."""
    common.seconds(call, device)
    times = max(1, int(SECONDS / min(common.seconds(call, device) for _ in range(3))))
    if not graphs:
        return lambda: [call() for _ in range(times)][-1], times
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay, times


def measure(bench: Bench, device: str, turns: int, graphs: bool) -> common.Times:
    """Seconds per call of each variant."""

    def seconds(run: Callable[[], Any], times: int) -> float:
        return common.seconds(run, device) / times

    runs = {name: repeated(call, device, graphs) for name, call in bench.calls.items()}
    return common.alternate({name: partial(seconds, *run) for name, run in runs.items()}, turns=turns)


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__, turns=9, model=False)
    made.set_defaults(device="cuda")
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float32 bfloat16 float16")
    made.add_argument("--graphs", action="store_true", help="replay calls from CUDA graphs")
    args = common.begin(made)
    if torch.device(args.device).type != "cuda":
        made.exit(2, f"--device {args.device}: the kernel measured here is for CUDA devices\n")
    rows = []
    for dtype in args.dtypes:
        for shape in QUICK if args.quick else SHAPES:
            for rank in RANKS:
                bench = Bench(shape, rank, getattr(torch, dtype), args.device)
                bench.check()
                times = measure(bench, args.device, args.turns, args.graphs)
                members, batch, m, n = shape
                for name in list(times)[1:]:
                    case = f"{members} members x {batch} x {m} x {n}, rank {rank}, {dtype}, {name}"
                    taken = {PLAIN: times[PLAIN], "population": times[name]}
                    target = TARGET if name == FUSED and batch == 64 else None
                    if (m, n, rank, dtype) == (8192, 8192, 1, "bfloat16"):
                        target = PAPER.get(name, target)
                    figure = common.ratio(taken, PLAIN, "population")
                    rows.append(common.row(case, figure, target=target, seconds=taken))
                    common.say(rows[-1])
                del bench
    print()
    common.finish("kernels_cuda", MEASURE, rows, args, graphs=args.graphs, sigma=SIGMA)


if __name__ == "__main__":
    main()
