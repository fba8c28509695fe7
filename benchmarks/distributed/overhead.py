"""What Ray costs: a pool of one worker against the same worker called directly, messages, states, catching up.

    python benchmarks/distributed/overhead.py [--turns 7] [--seconds 1.0]

A generation is 64 members in 16 ranges, evaluated and applied. "sleeping" members take the same time wherever they are,
so their ratio is what messages cost; "computing" members (a PyTorch network, one thread) also pay for sharing the
machine with Ray. The constants below the ratios are what benchmarks/distributed/simulate.py starts from.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch
from torch import nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.distributed import RayPool, TorchWorker
from eggroll.distributed.host import Host, from_message, to_message
from eggroll.distributed.partition import ranges
from eggroll.distributed.state import digest
from eggroll.loop import Evaluation, Heldout

MEASURE = "seconds of a generation on a pool of one worker / seconds of the same worker called directly"
TARGET = 1.05
SIZE = 64


class Sleeping:
    """A worker whose members take a fixed time, and whose state is ``megabytes`` of zeros."""

    def __init__(self, seconds_per_member: float = 0.0, megabytes: float = 0.0) -> None:
        self.seconds = seconds_per_member
        self.weights = np.zeros(int(megabytes * 2**18), dtype=np.float32)

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        time.sleep(self.seconds * len(members))
        return Evaluation(np.zeros(len(members)))

    def heldout(self, generation: int) -> Heldout:
        return Heldout(0.0)

    def apply(self, record: UpdateRecord) -> float:
        return 0.0

    def state_tensors(self) -> dict[str, Any]:
        return {"parameter/weights": self.weights}

    def load_state_tensors(self, tensors: Any) -> None:
        self.weights = np.asarray(tensors["parameter/weights"]).copy()


def settings() -> ESConfig:
    return ESConfig(population_size=SIZE, rank=1, sigma=0.01, lr=0.01)


def computing(rows: int) -> Callable[[], TorchWorker]:
    """A network of three layers of 512; ``rows`` sets how long a member takes."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))

    def fitness(model: nn.Module, active: Any, generation: int) -> torch.Tensor:
        x = torch.linspace(-1, 1, 512).expand(rows, 512).contiguous()
        return active.split(model(active.expand(x))).mean(dim=(1, 2))

    return lambda: TorchWorker(make, fitness, settings())


def record(generation: int, size: int = SIZE) -> UpdateRecord:
    weights = np.random.default_rng(generation).normal(size=size).astype(np.float32)
    return UpdateRecord.make(generation, 0.01, 0.01, weights)


def direct(worker: Any, generation: int) -> None:
    for members in ranges(SIZE):
        worker.evaluate(generation, 0.01, members)
    worker.apply(record(generation))


def pooled(pool: RayPool, generation: int) -> dict[str, float]:
    metrics = pool.evaluate(generation, 0.01).metrics
    pool.apply(record(generation))
    return metrics


def compare(case: str, factory: Callable[[], Any], args: Any) -> dict[str, Any]:
    """A row: the same generation by a pool of one worker and by the worker itself."""
    worker, count, metrics = factory(), iter(range(10**6)), {}
    with RayPool(factory, workers=1, population_size=SIZE, check_every=0) as pool:

        def by_pool() -> None:
            metrics.update(pooled(pool, next(count)))

        def by_itself() -> None:
            direct(worker, next(count))

        times = common.alternate(
            {"direct": lambda: common.seconds(by_itself), "pool": lambda: common.seconds(by_pool)}, turns=args.turns
        )
    sizes = {name: metrics[name] for name in ("sent_bytes", "received_bytes")}
    figure = common.ratio(times, "pool", "direct")
    made = common.row(case, figure, target=TARGET, lower_is_better=True, seconds=times, bytes_per_generation=sizes)
    common.say(made)
    return made


def rows_for(seconds: float) -> int:
    """Rows of a member with which a generation takes about so long here."""
    rows = 8
    while True:
        worker = computing(rows)()
        direct(worker, 0)
        taken = common.seconds(lambda worker=worker: direct(worker, 1))
        if taken > 0.3 * seconds:
            return max(1, round(rows * seconds / taken))
        rows *= 2


def message_seconds(turns: int, members: int) -> float:
    """Seconds of the driver for a range that costs nothing, with four workers that wait for the next one."""
    with RayPool(Sleeping, workers=4, population_size=members, range_size=2, check_every=0) as pool:
        pool.wait_until_ready(4)
        pool.evaluate(0, 0.01)
        times = [common.seconds(lambda: pool.evaluate(0, 0.01)) for _ in range(turns)]
    return statistics.median(times) / (members / 2)


def payload(members: int) -> dict[str, float]:
    """Bytes of an update and of a range's scores, by differences between sizes; nothing is started."""
    from ray import cloudpickle

    def size(values: Any) -> int:
        return len(cloudpickle.dumps(values))

    few, many = (("apply", (0, to_message(record(0, count)))) for count in (members, 2 * members))
    scores = [(np.zeros(count), {}, 0, []) for count in (members, 2 * members)]
    return {
        "update_bytes_per_member": (size(many) - size(few)) / members,
        "scores_bytes_per_member": (size(scores[1]) - size(scores[0])) / members,
        "scores_bytes_per_range": size((np.zeros(0), {}, 0, [])),
        "ask_bytes_per_range": size(("evaluate", (0, 0.01, 0, 64))),
    }


def catch_up(turns: int, factory: Callable[[], Any]) -> dict[str, float]:
    """Seconds per record: replayed by a worker that joins, and taken one by one by one that was there."""
    messages = [to_message(record(generation)) for generation in range(20)]
    replay, single = [], []
    for _ in range(turns):
        late, early = Host(lambda state: state), Host(lambda state: state)
        late.build(factory)
        early.build(factory)
        replay.append(common.seconds(lambda late=late: late.catch_up(None, 0, messages)) / 20)
        single.append(
            common.seconds(lambda early=early: [early.apply(i, message) for i, message in enumerate(messages)]) / 20
        )
    return {"replay_s_per_record": statistics.median(replay), "apply_s_per_record": statistics.median(single)}


def record_seconds(members: int) -> float:
    """Seconds per member to make a record of shaped fitness, and to make it again from its message."""
    return common.seconds(lambda: from_message(to_message(record(0, members)))) / members


def states(turns: int, megabytes: int) -> dict[str, float]:
    """Gigabytes per second from one worker to another through the object store of one machine, and of the digest."""
    times = []
    with RayPool(lambda: Sleeping(0.0, megabytes), workers=2, population_size=SIZE, check_every=0) as pool:
        pool.wait_until_ready(2)
        for _ in range(turns):

            def move() -> None:
                lead, other = pool._crew.ready()
                pool._crew.copy_lead(lead)
                pool._crew.rejoin(other)
                pool.wait_until_ready(2)

            times.append(common.seconds(move))
    zeros = {"parameter/weights": np.zeros(megabytes * 2**18, dtype=np.float32)}
    hashing = statistics.median(common.seconds(lambda: digest(zeros)) for _ in range(turns))
    scale = megabytes / 1024
    return {"state_gb_per_s": scale / statistics.median(times), "digest_gb_per_s": scale / hashing}


def joining(turns: int) -> float:
    """Seconds from asking for a worker that loads nothing to its being ready, on a cluster that runs."""
    times = []
    with RayPool(Sleeping, workers=1, population_size=SIZE, check_every=0) as pool:
        for turn in range(turns):
            start = time.perf_counter()
            pool.add_worker()
            pool.wait_until_ready(2 + turn)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    made = common.parser(__doc__, turns=7, model=False)
    made.add_argument("--seconds", type=float, default=1.0, help="length of a generation (default 1)")
    made.set_defaults(results=common.RESULTS / "distributed", threads=1)
    args = common.begin(made)
    if args.quick:
        args.seconds = 0.1
    import ray

    ray.init(address="local", num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rows = [compare(f"sleeping, {args.seconds:g} s", lambda: Sleeping(args.seconds / SIZE), args)]
    size = rows_for(args.seconds)
    rows.append(compare(f"computing, {args.seconds:g} s", computing(size), args))
    constants = {
        "driver_s_per_range": message_seconds(args.turns, 200 if args.quick else 4000),
        "join_s": joining(2 if args.quick else 5),
        "record_s_per_member": record_seconds(2000 if args.quick else 100_000),
        **payload(4096),
        **catch_up(args.turns, computing(1)),
        **states(2 if args.quick else args.turns, 4 if args.quick else 256),
    }
    ray.shutdown()
    print()
    for name, value in constants.items():
        print(f"{name}: {value:.6g}")
    print()
    common.finish(
        "overhead", MEASURE, rows, args, population_size=SIZE, ranges=len(ranges(SIZE)), constants=constants,
        ray=ray.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
