"""Episodes of unequal length: all in one batch until the last one is over, or the long ones in smaller batches.

    python benchmarks/rl/episodes.py [--envs jumanji/Snake-v1 CartPole-v1] [--members 128 1024] [--turns 5]

One generation of episodes of a random policy of 3 x 256 at sigma 0.1, in turns, in one process. The ratio is the time
of one batch over the time with smaller ones. Also: how long the episodes are, and how long each program's first call
took, compilation included.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import jax
import numpy as np

from eggroll.rl import RLConfig, make_worker, rollouts
from eggroll.rl.envs import registry

MEASURE = "time of one batch until its last episode is over / time with smaller batches for the long episodes"
ENVS = {"CartPole-v1": 500, "jumanji/Snake-v1": 1000, "navix/Navix-Dynamic-Obstacles-6x6-Random-v0": 100}


def player(env: str, members: int, limit: int, *, narrow: bool) -> tuple[Any, float]:
    """A function that plays a generation and gives the lengths of its episodes; seconds that its first call took."""
    widths = rollouts._widths
    if not narrow:
        rollouts._widths = lambda count: [count]
    try:
        config = RLConfig(
            env=env, population_size=members, members_per_forward=members, rank=1, sigma=0.1, episodes=1,
            max_steps=limit,
        )  # fmt: skip
        worker = make_worker(config, registry.make(env))
        pairs = np.arange(members // 2)

        def play() -> np.ndarray:
            played = worker.rollouts.population(worker.state.params, worker.stats, 0, 0.1, pairs)
            return np.asarray(jax.block_until_ready(played.lengths))

        began = time.perf_counter()
        play()
        return play, time.perf_counter() - began
    finally:
        rollouts._widths = widths


def main() -> None:
    made = common.parser(__doc__, turns=5, model=False)
    made.add_argument("--envs", nargs="+", default=list(ENVS))
    made.add_argument("--members", type=int, nargs="+", default=[128, 1024], help="population sizes")
    args = common.begin(made)
    if args.quick:
        args.envs, args.members = args.envs[:1], [128]
    rows = []
    for env in args.envs:
        for members in args.members:
            limit = 20 if args.quick else ENVS.get(env, 200)
            (one, first), (narrow, second) = (player(env, members, limit, narrow=on) for on in (False, True))
            lengths = one()
            assert np.array_equal(lengths, narrow()), env
            variants = {
                "one batch": lambda one=one: common.seconds(one),
                "smaller ones": lambda narrow=narrow: common.seconds(narrow),
            }
            times = common.alternate(variants, turns=args.turns)
            found = {"mean": float(lengths.mean()), "longest": int(lengths.max())}
            rows.append(
                common.row(
                    f"{env}, {members} members", common.ratio(times, "one batch", "smaller ones"), seconds=times,
                    lengths=found, first_call_seconds={"one batch": first, "smaller ones": second},
                )
            )  # fmt: skip
            common.say(rows[-1])
            print(f"  episodes of {found['mean']:.1f} steps, the longest {found['longest']}; first call {first:.1f} "
                  f"and {second:.1f} s", flush=True)  # fmt: skip
    common.finish("rl/episodes", MEASURE, rows, args)


if __name__ == "__main__":
    main()
