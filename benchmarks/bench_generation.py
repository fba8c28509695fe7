"""Plain inference against a whole generation (draw, evaluate, update) on the same rows: perplexity and written text.

    python benchmarks/bench_generation.py [--dtypes float32 bfloat16] [--device cuda] [--members 32]

A generation is what the trainer's own loop does, tokeniser, scores and all. Plain inference is the same number of rows
through the unperturbed model by the same functions: the likelihood of texts of 64 tokens, or 32 greedy tokens with a KV
cache, and what prompts share computed as often as there. No token ends a text here, so that both make the same number
of tokens.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from itertools import count
from types import SimpleNamespace
from typing import Any

import common
import torch
from torch import Tensor

from eggroll import llm
from eggroll.llm.backends.build import worker_of
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, prompts_of
from eggroll.llm.generation.chat import format_prompts
from eggroll.llm.generation.generate import generate
from eggroll.llm.rewards import PerplexityReward
from eggroll.llm.rewards.load import as_reward
from eggroll.loop import Loop

MEASURE = "time of plain inference / time of a whole generation (draw + evaluate + update), same rows, rank 1"
TARGET = 0.90
LENGTH, NEW_TOKENS = 64, 32
QUESTIONS = ("Why is the sky blue?", "What does a baker do at night?", "How do bees find flowers?", "Who reads maps?")


class Work:
    """One kind of work on one model: a whole generation of it, and the same rows without a population."""

    def __init__(self, loaded: llm.LoadedModel, args: Any, rows_per_member: int) -> None:
        self.model, self.tokenizer, self.device = loaded.model, loaded.tokenizer, loaded.device
        self.config = EggrollConfig(
            population_size=args.members,
            rank=1,
            sigma=0.01,
            lr=1e-3,
            max_tokens=args.new_tokens,
            max_length=LENGTH,
            members_per_forward=args.members,
            samples_per_generation=0,
        )
        self.copies, self.rows_per_member = args.members, rows_per_member
        self.reward = self.make_reward()
        self.worker = worker_of(self.model, self.config, self.reward, self.tokenizer)
        self.evaluator: Any = self.worker.evaluator
        self.evaluator.eos_ids = []
        self.batch = self.make_batch(args)
        self.worker.source = SimpleNamespace(at=lambda generation: self.batch)  # type: ignore[assignment]
        mode = self.evaluator.choose_mode(self.batch)
        assert mode == "rows", self.evaluator.note
        self.generations = count()
        self.parts: list[dict[str, Any]] = []

    def make_reward(self) -> Any:
        raise NotImplementedError

    def make_batch(self, args: Any) -> Any:
        raise NotImplementedError

    def plain(self) -> None:
        """The work of all members without members."""
        raise NotImplementedError

    def expand(self, x: Tensor) -> Tensor:
        return x.to(self.device).repeat(self.copies, 1)

    def plain_seconds(self) -> float:
        return common.seconds(self.plain, self.device)

    def generation_seconds(self) -> float:
        number = next(self.generations)
        config = dataclasses.replace(self.config, generations=number + 1)
        loop = Loop(config, self.worker)
        taken = common.seconds(lambda: loop.go(number), self.device)
        self.parts.append(loop.history[-1])
        return taken

    def part(self, name: str) -> float:
        """Median seconds of a part of the measured generations (the first one was the warm-up)."""
        return statistics.median(metrics[name] for metrics in self.parts[1:])


class Perplexity(Work):
    def make_reward(self) -> Any:
        return PerplexityReward(self.tokenizer, max_length=LENGTH)

    def make_batch(self, args: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (self.rows_per_member, args.length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def plain(self) -> None:
        inputs = {key: self.expand(x) for key, x in self.batch.items()}
        self.reward.log_likelihood(self.model, inputs)


class Text(Work):
    def make_reward(self) -> Any:
        return as_reward(lambda text: float(len(text)), self.tokenizer)

    def make_batch(self, args: Any) -> list[Example]:
        return [Example(QUESTIONS[index % len(QUESTIONS)]) for index in range(self.rows_per_member)]

    def plain(self) -> None:
        texts = format_prompts(self.tokenizer, prompts_of(self.batch))
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        made = generate(
            self.model,
            self.expand(encoded.input_ids),
            self.expand(encoded.attention_mask),
            max_tokens=self.config.max_tokens,
            eos_ids=[],
            pad_id=int(self.tokenizer.pad_token_id),
            prompts=self.rows_per_member,
        )
        assert sum(map(len, made)) == self.copies * self.rows_per_member * self.config.max_tokens

    def generation_seconds(self) -> float:
        taken = super().generation_seconds()
        tokens = round(self.parts[-1]["tokens_per_s"] * self.parts[-1]["evaluate_s"])
        assert tokens == self.copies * self.rows_per_member * self.config.max_tokens, tokens
        return taken


KINDS: dict[str, Callable[..., Work]] = {"perplexity": Perplexity, "text": Text}


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__, turns=5)
    made.add_argument("--length", type=int, default=LENGTH, help="tokens of a scored text (default 64)")
    made.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="tokens of a written text (default 32)")
    made.add_argument("--rows-per-member", type=int, nargs="+", default=[1, 8], help="prompts a member (default 1 8)")
    args = common.begin(made)
    if args.quick:
        args.length, args.new_tokens, args.rows_per_member = 8, 4, [1]
    rows = []
    for dtype in args.dtypes:
        for kind, make in KINDS.items():
            for size in args.rows_per_member:
                # A fresh model each time: updates change it, and 16-bit models have masters to be freed.
                work = make(llm.load(args.model, dtype=dtype, device=args.device), args, size)
                variants = {"plain": work.plain_seconds, "generation": work.generation_seconds}
                times = common.alternate(variants, turns=args.turns)
                parts = {name: work.part(f"{name}_s") for name in ("draw", "evaluate", "update")}
                parts["evaluate"] -= parts["draw"]  # the loop counts drawing as a part of evaluation
                tokens = f"{args.length} tokens" if kind == "perplexity" else f"{args.new_tokens} new tokens"
                case = f"{kind}, {args.members} x {size} rows, {tokens}, {dtype}"
                figure = common.ratio(times, "plain", "generation")
                rows.append(common.row(case, figure, target=TARGET, seconds=times, parts_seconds=parts))
                common.say(rows[-1])
                print("  " + ", ".join(f"{name} {taken * 1e3:,.0f} ms" for name, taken in parts.items()), flush=True)
                del work, variants
    print()
    facts = {"model": args.model, "members": args.members, "rank": 1, "optimizer": EggrollConfig().optimizer}
    common.finish("generation", MEASURE, rows, args, **facts)


if __name__ == "__main__":
    main()
