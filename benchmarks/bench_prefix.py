"""What it saves to compute a beginning that all prompts share once per member: countdown with worked examples.

    python benchmarks/bench_prefix.py [--members 8] [--prompts 8] [--shots 0 2] [--max-tokens 48]

A generation's evaluation (rank 1, greedy, no token ends a text) with sharing and without, in turns. The floor is the
ratio of the positions that the model computes: members x prompts x (prefix + rest + new) over
members x (prefix + prompts x (rest + new)).
"""

from __future__ import annotations

from itertools import count
from typing import Any

import common
import torch

from eggroll import llm
from eggroll.llm.backends.torch import TorchEvaluator, replica_for
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import load_examples
from eggroll.llm.generation import generate as decoding
from eggroll.llm.generation.prefix import common_prefix
from eggroll.llm.rewards.load import as_reward
from eggroll.llm.tasks import get_task

MEASURE = (
    "seconds of evaluating a generation with every prompt alone / with the shared beginning computed once a member"
)


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__, turns=5)
    made.add_argument("--prompts", type=int, default=8, help="prompts a member (default 8)")
    made.add_argument("--shots", type=int, nargs="+", default=[0, 2], help="worked examples (default 0 2)")
    made.add_argument("--max-tokens", type=int, default=48)
    args = common.begin(made, members=8)
    if args.quick:
        args.prompts, args.max_tokens, args.shots = 2, 2, [1]
    rows = []
    for dtype in args.dtypes:
        for shots in args.shots:
            loaded = llm.load(args.model, dtype=dtype, device=args.device)
            task = get_task("countdown", shots=shots)
            config = EggrollConfig(
                population_size=args.members, rank=1, sigma=0.01, max_tokens=args.max_tokens, system=task.system,
                members_per_forward=args.members, samples_per_generation=0, max_length=1024,
            )  # fmt: skip
            replica = replica_for(loaded.model, config)
            reward = as_reward(lambda text: float(len(text)), loaded.tokenizer)
            evaluator = TorchEvaluator(replica.population, loaded.tokenizer, reward, config)
            evaluator.eos_ids = []
            batch = load_examples(task.train[: args.prompts])
            assert evaluator.choose_mode(batch) == "rows", evaluator.note
            ids, mask = evaluator.encode(batch).padded(int(loaded.tokenizer.pad_token_id), left=True)
            prefix, length = common_prefix(ids, mask), ids.shape[1]
            times = common.alternate(variants(evaluator, batch, loaded.device), turns=args.turns)
            new = length + args.max_tokens
            floor = args.prompts * new / (prefix + args.prompts * (new - prefix))
            case = (
                f"{args.members} x {args.prompts} prompts of {length} tokens, {prefix} shared, {args.max_tokens} new, "
                f"{dtype}"
            )
            rows.append(common.row(case, common.ratio(times, "alone", "shared"), seconds=times, positions_ratio=floor))
            common.say(rows[-1])
    common.finish("prefix", MEASURE, rows, args, model=args.model, members=args.members, rank=1)


def variants(evaluator: TorchEvaluator, batch: Any, device: torch.device) -> dict[str, Any]:
    """The same generation again and again, with and without sharing."""
    number = count()

    def run(find: Any) -> float:
        decoding.common_prefix = find
        try:
            return common.seconds(lambda: evaluator.evaluate(next(number), 0.01, batch), device)
        finally:
            decoding.common_prefix = common_prefix

    return {"alone": lambda: run(lambda ids, mask: 0), "shared": lambda: run(common_prefix)}


if __name__ == "__main__":
    main()
