"""Written text with transformers' attention and cache, and with ours, on a CPU: the same prompts, rows and tokens.

    python benchmarks/bench_decoding.py [--rows 64] [--new-tokens 64] [--dtypes bfloat16]

No population: both are the model as it is, through the same loop. ``transformers`` is its ``sdpa`` and its growing
cache, which copies itself at each token; ``ours`` is the C call of ``attention_c`` and a cache with room. The floor is
the products of the step alone, which both make: the time of ours without attention and cache cannot be lower.
"""

from __future__ import annotations

from typing import Any

import common
import torch

from eggroll import llm
from eggroll.llm.generation import attention, prefix
from eggroll.llm.generation.generate import generate
from eggroll.torch.kernels import attention_c

MEASURE = "seconds of writing the same text with transformers' attention and cache / with ours"


@torch.no_grad()
def main() -> None:
    made = common.parser(__doc__, turns=5)
    made.add_argument("--rows", type=int, nargs="+", default=[8, 64])
    made.add_argument("--prompt-tokens", type=int, default=48)
    made.add_argument("--new-tokens", type=int, default=64)
    args = common.begin(made)
    if args.quick:
        args.rows, args.new_tokens, args.prompt_tokens = [2], 3, 8
    table = []
    for dtype in args.dtypes:
        loaded = llm.load(args.model, dtype=dtype, device=args.device)
        if (reason := attention_c.why_not(getattr(torch, dtype))) is not None:
            raise SystemExit(f"nothing to compare: {reason}")
        for rows in args.rows:
            draw, vocabulary = torch.Generator().manual_seed(0), loaded.model.config.vocab_size
            ids = torch.randint(100, min(10_000, vocabulary), (rows, args.prompt_tokens), generator=draw)
            times = common.alternate(variants(loaded.model, ids, args.new_tokens), turns=args.turns)
            case = f"{rows} rows, {args.prompt_tokens} + {args.new_tokens} tokens, {dtype}"
            table.append(common.row(case, common.ratio(times, "transformers", "ours"), seconds=times))
            common.say(table[-1])
    common.finish("decoding", MEASURE, table, args, model=args.model)


def variants(model: Any, ids: torch.Tensor, new: int) -> dict[str, Any]:
    """The same text by both ways."""
    mask = torch.ones_like(ids)

    def write() -> None:
        generate(model, ids, mask, max_tokens=new, eos_ids=[], pad_id=0)

    def by_transformers() -> float:
        ours, layer = attention._configs, prefix.growing
        attention._configs, prefix.growing = lambda model: [], lambda cache: cache
        try:
            return common.seconds(write)
        finally:
            attention._configs, prefix.growing = ours, layer

    return {"transformers": by_transformers, "ours": lambda: common.seconds(write)}


if __name__ == "__main__":
    main()
