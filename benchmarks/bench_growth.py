"""What a generation costs as population, rank and model grow, beside the cost of plain inference on the same rows.

    python benchmarks/bench_growth.py [--turns 5] [--most 4096] [--models 10 135 500] [--dtypes float32]

A generation is what :meth:`eggroll.torch.Replica.step` does: draw, evaluate 64 tokens a member, update. Random Llamas,
rank 1 unless rank grows, 32 members unless the population grows. Cost is a generation's time over the time of plain
inference of as many rows through the same model; 1 is the ideal, whatever grows. A picture goes beside the result file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eggroll import ESConfig
from eggroll.torch import Replica

MEASURE = "time of a generation (draw + evaluate + update) / time of plain inference on the same rows"
LENGTH, MEMBERS = 64, 32
PER_FORWARD = 64
"""Members of one forward pass, where the population is larger."""
RANKS = (1, 2, 4, 8, 16)
SIZES = {  # millions of parameters: hidden, intermediate, layers, heads, key and value heads
    1: (64, 192, 2, 2, 2), 10: (256, 768, 8, 4, 2), 135: (576, 1536, 30, 9, 3), 500: (1024, 2816, 36, 16, 4),
}  # fmt: skip
VOCABULARY = 8192


def llama(millions: int, dtype: str) -> Any:
    """A random Llama with about this many million parameters."""
    hidden, wide, layers, heads, kv = SIZES[millions]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


class Case:
    """One model, population size and rank: the two things that are compared."""

    def __init__(self, model: Any, members: int, rank: int) -> None:
        self.model, self.members = model, members
        config = ESConfig(population_size=members, rank=rank, sigma=0.01, lr=1e-4, generations=10**6)
        self.replica = Replica(model, config)
        self.ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def score(self, model: Any, active: Any) -> torch.Tensor:
        """Mean log likelihood of one text, ``(members,)``."""
        logits = active.split(model(input_ids=active.expand(self.ids), use_cache=False).logits)
        picked = logits[:, 0, :-1].log_softmax(-1).gather(-1, self.ids[:, 1:, None].expand(len(logits), -1, 1))
        return picked.float().mean((1, 2))

    def generation(self) -> float:
        """Seconds of a generation."""
        return common.seconds(lambda: self.replica.step(self.score, members_per_forward=self.part))

    def plain(self) -> float:
        """Seconds of as many rows through the unperturbed model, in the same parts, likelihood and all."""

        def run() -> None:
            for first in range(0, self.members, self.part):
                ids = self.ids.expand(min(self.part, self.members - first), -1)
                logits = self.model(input_ids=ids, use_cache=False).logits
                logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).float().mean((1, 2))

        return common.seconds(run)

    @property
    def part(self) -> int:
        return min(PER_FORWARD, self.members)


def cases(args: Any, dtype: str) -> Iterator[tuple[str, int, Callable[[], Case]]]:
    """What grows, its value, and what is measured there."""
    small = min(args.models)
    for members in [2**k for k in range(1, 13) if 2**k <= args.most]:
        yield "population", members, lambda members=members: Case(llama(small, dtype), members, 1)
    for rank in RANKS:
        yield "rank", rank, lambda rank=rank: Case(llama(args.rank_model, dtype), args.members, rank)
    for millions in args.models:
        yield "model", millions, lambda millions=millions: Case(llama(millions, dtype), args.members, 1)


def draw(rows: list[dict[str, Any]], path: Path, hardware: str) -> None:
    """Cost against what grows, one panel each, with the ideal line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"population": "members", "rank": "rank", "model": "millions of parameters"}
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axes, (grows, label) in zip(panels, names.items(), strict=True):
        for dtype in sorted({row["dtype"] for row in rows}):
            own = [row for row in rows if row["grows"] == grows and row["dtype"] == dtype]
            x, middle = [row["value"] for row in own], [row["ratio"]["median"] for row in own]
            low, high = ([row["ratio"][end] for row in own] for end in ("min", "max"))
            axes.plot(x, middle, marker="o", label=dtype)
            axes.fill_between(x, low, high, alpha=0.2)
        axes.axhline(1.0, color="gray", linestyle="--", label="ideal: plain inference")
        axes.set_xscale("log", base=2 if grows != "model" else 10)
        axes.set_xticks(x, [str(value) for value in x])
        axes.minorticks_off()
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("generation / plain inference")
    panels[0].legend()
    figure.suptitle(f"What a generation costs ({hardware}; median, smallest and largest)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__, turns=5)
    made.add_argument("--most", type=int, default=4096, help="largest population (default 4096)")
    made.add_argument("--models", type=int, nargs="+", default=[10, 135, 500], choices=SIZES, help="millions")
    made.add_argument("--rank-model", type=int, default=135, choices=SIZES, help="the model whose rank grows, millions")
    made.set_defaults(dtypes=["float32"])
    args = common.begin(made, members=MEMBERS)
    if args.quick:
        args.most, args.models, args.rank_model = 4, [1], 1
    rows = []
    for dtype in args.dtypes:
        for grows, value, make in cases(args, dtype):
            case = make()
            times = common.alternate({"plain": case.plain, "generation": case.generation}, turns=args.turns)
            figure = common.ratio(times, "generation", "plain")
            row = common.row(
                f"{grows} {value}, {dtype}", figure, lower_is_better=True, seconds=times,
                grows=grows, value=value, dtype=dtype,
            )  # fmt: skip
            rows.append(row)
            common.say(row)
    path = common.finish("growth", MEASURE, rows, args, length=LENGTH, members=args.members)
    if path is not None:
        draw(rows, path.with_suffix(".png"), common.hardware(args.device))


if __name__ == "__main__":
    main()
