"""One product with its low-rank term, in blocks of rows of several sizes, against the product alone.

    python benchmarks/bench_blocks.py [--dtypes float32 bfloat16] [--threads 2]

Rows of 32 members through weights of SmolLM2-135M's shapes. The size that runs take follows the processor
(``eggroll.torch.kernels.cache``); this says what other sizes would give.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch import low_rank

MEASURE = "time of F.linear on the same rows / time of the product with its low-rank term"
MEMBERS, ROWS, RANKS = 32, (2048, 8192), (1, 8)
SHAPES = ((576, 576), (576, 1536), (1536, 576))
SIZES = {f"{megabytes} MB": megabytes * 2**20 for megabytes in (1, 4, 8, 16)} | {"no blocks": 2**50}
CALLS = 3
PLAIN = "F.linear"


def seconds(call: Callable[[], Tensor], size: int) -> float:
    """Of one call, with blocks of a size in bytes."""
    low_rank.BLOCK_BYTES = size
    return common.seconds(lambda: [call() for _ in range(CALLS)]) / CALLS


@torch.inference_mode()
def main() -> None:
    made = common.parser(__doc__, turns=9, model=False)
    made.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float32 bfloat16")
    args = common.begin(made)
    own = low_rank.BLOCK_BYTES
    rows = []
    for dtype in args.dtypes:
        for count in (64,) if args.quick else ROWS:
            for n, m in SHAPES[:1] if args.quick else SHAPES:
                for rank in RANKS:
                    make = partial(torch.randn, generator=torch.Generator().manual_seed(0))
                    shapes = ((count, n), (m, n), (MEMBERS, m, rank), (MEMBERS, n, rank))
                    x, weight, a, b = (make(shape).to(getattr(torch, dtype)) for shape in shapes)
                    whole = partial(low_rank.linear, x, weight, a, b)
                    variants = {name: partial(seconds, whole, size) for name, size in SIZES.items()}
                    variants |= {PLAIN: partial(seconds, partial(F.linear, x, weight), own)}
                    times = common.alternate(variants, turns=args.turns)
                    for name in SIZES:
                        case = f"{count} rows, {n} to {m}, rank {rank}, {dtype}, {name}"
                        taken = {"plain": times[PLAIN], "population": times[name]}
                        rows.append(common.row(case, common.ratio(times, PLAIN, name), seconds=taken))
                        common.say(rows[-1])
    common.finish("blocks", MEASURE, rows, args, block_bytes=own)


if __name__ == "__main__":
    main()
