"""Plain inference against the population forward on the same rows, noise already drawn: prefill and decode.

    python benchmarks/bench_population_forward.py [--dtypes float32 bfloat16] [--device cuda] [--ranks 1 8]

Both call the same model object. The population's values are made before the clock starts; only model calls are timed,
except in the lines "noise drawn on the fly", where a generation's noise is drawn anew each time. Prefill fills a KV
cache and gives the last position's logits; decode is the time of one step with the cache, from a context of 64 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import common
import torch
from torch import Tensor

from eggroll import llm
from eggroll.torch import Population
from eggroll.torch.replica import MATRIX_KINDS

EVERYTHING = ("matrix", "conv", "experts", "embedding", "vector", "other")
MEASURE = "time of plain inference / time of the population forward, same rows, rank 1 where no rank is named"
SIGMA = 0.01


class Bench:
    """One model and one population of it; each method is one measurement, in seconds."""

    def __init__(
        self,
        model: Any,
        kinds: tuple[str, ...],
        members: int,
        length: int,
        steps: int,
        check: bool = True,
        rank: int = 1,
    ) -> None:
        self.model, self.members, self.length, self.steps = model, members, length, steps
        self.population = Population(model, population_size=members, sigma=SIGMA, rank=rank, kinds=kinds)
        self.device = next(model.parameters()).device
        self.last = torch.tensor([-1], device=self.device)
        self.generations = count(1)
        self.caches: dict[tuple[int, bool], Any] = {}
        self.population.prepare(0)
        # Speed of wrong results would be worth nothing: compare some members with the same members alone.
        if check:
            self.population.verify(**self.inputs(self.tokens(members)))

    def tokens(self, rows: int) -> Tensor:
        """The same token ids each time, ``(rows, length)``."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (rows, self.length), generator=generator).to(self.device)

    def inputs(self, ids: Tensor, past: int = 0) -> dict[str, Tensor]:
        """What :func:`eggroll.llm.generation.generate.generate` gives the model."""
        rows, length = ids.shape
        positions = torch.arange(past, past + length, device=self.device).expand(rows, length)
        mask = torch.ones(rows, past + length, dtype=torch.long, device=self.device)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits_to_keep": self.last}

    @contextmanager
    def who(self, perturbed: bool) -> Iterator[None]:
        """The plain model or the population, whose values are made on entry."""
        if not perturbed:
            yield
            return
        with self.population.perturbed(0):
            yield

    def fill(self, ids: Tensor) -> Any:
        """Prefill; returns the KV cache."""
        return self.model(**self.inputs(ids), use_cache=True).past_key_values

    def decode(self, ids: Tensor, cache: Any) -> None:
        """Some greedy steps with the cache."""
        token = ids[:, -1:]
        for step in range(self.steps):
            out = self.model(**self.inputs(token, self.length + step), past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)

    def prefill_seconds(self, ids: Tensor, perturbed: bool) -> float:
        with self.who(perturbed):
            return common.seconds(lambda: self.fill(ids), self.device)

    def decode_seconds(self, ids: Tensor, perturbed: bool) -> float:
        with self.who(perturbed):
            case = (len(ids), perturbed)
            if case not in self.caches:
                self.caches = {key: cache for key, cache in self.caches.items() if key[0] == len(ids)}
                self.caches[case] = self.fill(ids)
            cache = self.caches[case]
            taken = common.seconds(lambda: self.decode(ids, cache), self.device) / self.steps
            cache.crop(-self.steps)
            return taken

    def drawing_seconds(self, ids: Tensor) -> float:
        generation = next(self.generations)

        def draw_and_fill() -> None:
            self.population.prepare(generation)
            with self.population.perturbed(generation):
                self.fill(ids)

        taken = common.seconds(draw_and_fill, self.device)
        self.population.prepare(0)
        return taken


def measure(bench: Bench, ids: Tensor, what: str, turns: int) -> common.Times:
    """Times of plain inference, of the population, and for prefill of the population with drawing."""
    method = bench.prefill_seconds if what == "prefill" else bench.decode_seconds
    variants = {"plain": partial(method, ids, False), "population": partial(method, ids, True)}
    if what == "prefill":
        variants["with drawing"] = partial(bench.drawing_seconds, ids)
    return common.alternate(variants, turns=turns)


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--length", type=int, default=64, help="tokens of context (default 64)")
    made.add_argument("--steps", type=int, default=8, help="decoding steps per measurement (default 8)")
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 8], help="ranks of the noise (default 1 8)")
    args = common.begin(made)
    if args.quick:
        args.length, args.steps = 8, 2
    cuda = torch.device(args.device).type == "cuda"
    targets = {"prefill": 0.95, "decode": 0.95 if cuda else 0.92}
    higher = {"prefill": 0.90}
    """Targets of ranks above 1: more work, the same traffic."""
    plans = [("everything", EVERYTHING, (1,), 1)] if 1 in args.ranks else []
    plans = [*(("matrices", MATRIX_KINDS, (1, 4), rank) for rank in args.ranks), *plans]
    rows = []
    for dtype in args.dtypes:
        model = llm.load(args.model, dtype=dtype, device=args.device).model
        for label, kinds, sizes, rank in plans:
            bench = Bench(model, kinds, args.members, args.length, args.steps, rank=rank)
            for what in ("prefill", "decode"):
                for size in sizes:
                    ids = bench.tokens(args.members * size)
                    times = measure(bench, ids, what, args.turns)
                    shape = (
                        f"{args.members} x {size} x {args.length} tokens" if what == "prefill" else f"{len(ids)} rows"
                    )
                    case = f"{what}, {shape}, {dtype}"
                    if label == "everything":
                        case += ", everything perturbed"
                    if rank > 1:
                        case += f", rank {rank}"
                    target = None if label == "everything" else (targets if rank == 1 else higher).get(what)
                    drawing = times.pop("with drawing", None)
                    figure = common.ratio(times, "plain", "population")
                    rows.append(common.row(case, figure, target=target, seconds=times))
                    common.say(rows[-1])
                    if drawing is not None and label == "matrices":
                        fly = {"plain": times["plain"], "population": drawing}
                        figure = common.ratio(fly, "plain", "population")
                        case += ", noise drawn on the fly"
                        rows.append(common.row(case, figure, target=0.90 if cuda else None, seconds=fly))
                        common.say(rows[-1])
            del bench
        del model
    print()
    facts = {
        "model": args.model,
        "members": args.members,
        "ranks": args.ranks,
        "length": args.length,
        "steps": args.steps,
    }
    common.finish("population_forward", MEASURE, rows, args, **facts)


if __name__ == "__main__":
    main()
