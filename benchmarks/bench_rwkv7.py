"""Plain inference of RWKV-7 against a population of it on the same rows: prompts read at once, and tokens written.

    python benchmarks/bench_rwkv7.py [--dtypes float32 bfloat16] [--members 32]

The model has the shape of the 0.1B checkpoints (12 layers, 768 wide, 65,536 tokens) and random weights. Both sides run
the same modules and the same recurrence, so the ratio is what the low-rank terms cost.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import common
import torch
from torch import Tensor

from eggroll.llm.rwkv7.config import RWKV7Config
from eggroll.llm.rwkv7.model import RWKV7ForCausalLM
from eggroll.torch import Population

MEASURE = "time of plain inference / time of the population, same rows, rank 1, one row for each member"
TARGETS = {"prefill": 0.85, "decode": 0.90}


class Bench:
    """One model and its population."""

    def __init__(self, dtype: torch.dtype, args: Any) -> None:
        torch.manual_seed(0)
        size = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512} if args.quick else {}
        self.model = RWKV7ForCausalLM(RWKV7Config(**size)).to(args.device, dtype).eval().requires_grad_(False)
        self.population = Population(
            self.model, population_size=args.members, sigma=0.01, kinds=("matrix",), exclude=("head",)
        )
        self.ids = torch.randint(1, 500, (args.members, args.length), device=args.device)
        self.steps, self.device = args.steps, args.device
        self.population.verify(input_ids=self.ids[:, :4], logits_to_keep=1)

    def forward(self, ids: Tensor, state: Any = None) -> Any:
        return self.model(ids, past_key_values=state, use_cache=True, logits_to_keep=1)

    def decode(self, state: Any) -> None:
        token = self.ids[:, -1:]
        for _ in range(self.steps):
            out = self.forward(token, state)
            token, state = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values

    def seconds(self, what: str, perturbed: bool) -> float:
        """Time of reading the prompts, or of a token of every row."""
        if not perturbed:
            return self._seconds(what)
        with self.population.perturbed(0):
            return self._seconds(what)

    def _seconds(self, what: str) -> float:
        if what == "prefill":
            return common.seconds(partial(self.forward, self.ids), self.device)
        state = self.forward(self.ids[:, :4]).past_key_values
        return common.seconds(partial(self.decode, state), self.device) / self.steps


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__, model=False)
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float32 bfloat16")
    made.add_argument("--members", type=int, help="members of the population")
    made.add_argument("--length", type=int, default=64, help="tokens of a prompt (default 64)")
    made.add_argument("--steps", type=int, default=8, help="tokens written per measurement (default 8)")
    args = common.begin(made)
    if args.quick:
        args.length, args.steps = 20, 2
    rows = []
    for dtype in args.dtypes:
        bench = Bench(getattr(torch, dtype), args)
        bench.population.prepare(0)
        for what, target in TARGETS.items():
            variants = {"plain": partial(bench.seconds, what, False), "population": partial(bench.seconds, what, True)}
            times = common.alternate(variants, turns=args.turns)
            label = f"{what}, {args.members} members" + (f" x {args.length} tokens" if what == "prefill" else "")
            line = common.row(
                f"{label}, {dtype}",
                common.ratio(times, "plain", "population"),
                target=None if args.quick else target,
                seconds=times,
            )
            common.say(line)
            rows.append(line)
    common.finish("rwkv7", MEASURE, rows, args)


if __name__ == "__main__":
    main()
