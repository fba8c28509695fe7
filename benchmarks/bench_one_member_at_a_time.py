"""Members per second against "add noise to all weights in place, run, subtract it", one member after the other.

    python benchmarks/bench_one_member_at_a_time.py [--dtypes float32 bfloat16] [--device cuda] [--members 32]

Every member scores a text of 64 tokens (its perplexity). The other way is done in two forms: dense noise, drawn with
torch.randn from a seed and drawn again to be subtracted, so that it need not be kept; and low-rank noise, whose factors
are drawn once and multiplied straight into the weights. Both sides draw their noise inside the measured time, and
perturb the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import common
import torch
from torch import Tensor

from eggroll import llm
from eggroll.llm.rewards import PerplexityReward
from eggroll.torch import Population
from eggroll.torch.replica import MATRIX_KINDS

MEASURE = "members per second of the population / members per second one at a time in place"
TARGET = 15.0
SIGMA = 0.01


class Bench:
    """A model, its population, and a text; each method is one measurement, in seconds per member."""

    def __init__(self, loaded: llm.LoadedModel, members: int, one_by_one: int, length: int) -> None:
        self.model, self.device = loaded.model, loaded.device
        self.one_by_one = one_by_one
        self.population = Population(self.model, population_size=members, sigma=SIGMA, rank=1, kinds=MATRIX_KINDS)
        self.weights: list[Tensor] = [self.population.parameter(s.name).detach() for s in self.population.specs]
        assert all(weight.ndim == 2 for weight in self.weights), "the in-place forms here are those of matrices"
        self.reward = PerplexityReward(loaded.tokenizer, max_length=length)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        self.ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(self.device)
        self.generator = torch.Generator(self.device)
        self.numbers = count()
        members_checked = range(min(4, members))
        self.population.verify(self.ids.repeat(len(members_checked), 1), members=members_checked)

    def score(self, copies: int = 1) -> list[float]:
        return self.reward.log_likelihood(self.model, self.ids.repeat(copies, 1)).tolist()

    def together(self) -> float:
        """All members as rows of one batch."""
        population, generation = self.population, next(self.numbers)

        def run() -> None:
            population.noise.prepare(generation, population.num_pairs, self.device)
            with population.perturbed(generation):
                self.score(population.population_size)

        return common.seconds(run, self.device) / population.population_size

    def in_place(self, add: Callable[[int], Callable[[], None]]) -> float:
        """Some members one after the other; ``add`` perturbs the weights and returns what takes it back."""

        def run() -> None:
            for _ in range(self.one_by_one):
                undo = add(next(self.numbers))
                self.score()
                undo()

        return common.seconds(run, self.device) / self.one_by_one

    def add_dense(self, seed: int) -> Callable[[], None]:
        def add(sign: float) -> None:
            self.generator.manual_seed(seed)
            for weight in self.weights:
                weight.add_(self.normals(weight.shape, weight.dtype), alpha=sign * SIGMA)

        add(1.0)
        return partial(add, -1.0)

    def add_low_rank(self, seed: int) -> Callable[[], None]:
        self.generator.manual_seed(seed)
        factors = [[self.normals((size, 1), weight.dtype) for size in weight.shape] for weight in self.weights]

        def add(sign: float) -> None:
            for weight, (a, b) in zip(self.weights, factors, strict=True):
                weight.addmm_(a, b.T, alpha=sign * SIGMA)

        add(1.0)
        return partial(add, -1.0)

    def normals(self, shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)


def lines(bench: Bench, args: Any, dtype: str) -> Iterator[dict[str, Any]]:
    variants = {
        "population": bench.together,
        "dense": partial(bench.in_place, bench.add_dense),
        "low rank": partial(bench.in_place, bench.add_low_rank),
    }
    times = common.alternate(variants, turns=args.turns)
    for form in ("dense", "low rank"):
        case = f"{form} noise in place, {args.members} members, {args.length} tokens, {dtype}"
        taken = {"population": times["population"], "one at a time": times[form]}
        figure = common.ratio(taken, "one at a time", "population")
        rates = {name: 1.0 / common.spread(values)["median"] for name, values in taken.items()}
        yield common.row(case, figure, target=TARGET, seconds=taken, members_per_second=rates)


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--length", type=int, default=64, help="tokens of the text (default 64)")
    made.add_argument("--one-by-one", type=int, default=4, help="members one at a time per measurement (default 4)")
    args = common.begin(made)
    if args.quick:
        args.length, args.one_by_one = 8, 1
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        loaded = llm.load(args.model, dtype=dtype, device=args.device)
        bench = Bench(loaded, args.members, args.one_by_one, args.length)
        for line in lines(bench, args, dtype):
            rows.append(line)
            common.say(line)
        del bench, loaded
    print("\ntimes are per member")
    facts = {"model": args.model, "members": args.members, "rank": 1, "one_by_one": args.one_by_one}
    common.finish("one_member_at_a_time", MEASURE, rows, args, **facts)


if __name__ == "__main__":
    main()
