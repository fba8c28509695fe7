"""What a kill costs: processes of a run are killed at random moments, with other work on the machine or without.

    python benchmarks/distributed/kills.py --what worker [--kills 10] [--load 4] [--seed 0]

Victims are killed with SIGKILL, ``--kills`` times each, at a random moment (``--what`` takes several):

- ``worker``: one of two worker processes. Seconds until the next generation is finished.
- ``raylet``: Ray's process on this machine. Seconds until the run has ended with a line that says so; it then resumes.
- ``driver``: the process of the run. Seconds until none of its processes is left; the run then resumes.
- ``rl``: ``eggroll rl`` without workers. Seconds until the resumed run has finished a generation.

Every run has to end with the weights of an undisturbed one, bit for bit. ``--load N`` keeps N processes computing
beside it. What a kill loses is the number of finished generations that the resumed run trains again.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import psutil

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.loop import Evaluation, Heldout

MEASURE = "seconds from a kill to what the case names; lost: finished generations that had to be trained again"
TARGET = 90.0
"""Seconds. A run that stands still for longer looks dead to whoever waits for it."""
GENERATIONS = {"pool": 40, "rl": 12}
PER_KILL = {"pool": 4, "rl": 15}
"""Generations of a run for each kill, so that it is still running at the last of them."""
RL = ["rl", "--env", "gymnasium/CartPole-v1", "-p", "16", "--episodes", "1", "--max-steps", "50"]
RL += ["--report-to", "none"]


class Vector:
    """A worker whose members take 10 ms each: a vector that is pulled towards another one."""

    def __init__(self) -> None:
        self.theta = np.zeros(1000, dtype=np.float32)
        self.target = np.linspace(-1, 1, 1000, dtype=np.float32)

    def _noise(self, generation: int, member: int) -> np.ndarray:
        draw = np.random.default_rng((generation, member // 2)).standard_normal(1000).astype(np.float32)
        return draw if member % 2 == 0 else -draw

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Scores after 10 ms each."""
        time.sleep(0.01 * len(members))
        found = [self.theta + np.float32(sigma) * self._noise(generation, member) for member in members]
        fitness = np.array([-np.square(one - self.target).sum() for one in found])
        return Evaluation(fitness, {}, tokens=len(members), samples=[])

    def heldout(self, generation: int) -> Heldout:
        """The distance that is left."""
        return Heldout(-float(np.square(self.theta - self.target).sum()), [], {})

    def apply(self, record: UpdateRecord) -> float:
        """One step."""
        before = self.theta.copy()
        for member, weight in enumerate(record.weights):
            self.theta += np.float32(record.lr) / len(record.weights) * weight * self._noise(record.generation, member)
        return float(np.linalg.norm(self.theta - before))

    def state_tensors(self) -> dict[str, np.ndarray]:
        """All that there is."""
        return {"parameter/theta": self.theta}

    def load_state_tensors(self, tensors: Any) -> None:
        """Take the state of another one."""
        self.theta = np.asarray(tensors["parameter/theta"]).copy()


def run_pool(directory: str, generations: int, *, resume: bool, local: bool) -> None:
    """A run on two workers, in a process that can be killed; ``local`` needs no Ray and has the same results."""
    from eggroll.distributed import evolve
    from eggroll.errors import EggrollError

    config = ESConfig(population_size=32, rank=1, sigma=0.1, lr=0.3, generations=generations)
    try:
        evolve(Vector, config, workers=2, run=directory, resume=resume, local=local, checkpoint_every=5, notify=print)
    except EggrollError as error:
        print(f"error: {error}")
        sys.exit(1)


class Run:
    """A run in a process of its own."""

    def __init__(self, kind: str, directory: Path, generations: int) -> None:
        self.kind, self.directory, self.generations = kind, directory, generations
        self.output = directory.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.lowest = 0
        """Finished generations when there were fewest, since the last start: where the run went on."""

    def start(self, *, resume: bool = False, local: bool = False) -> None:
        """Begin, or go on."""
        if self.kind == "rl":
            where = ["--resume", str(self.directory)] if resume else ["-o", str(self.directory)]
            words = ["-m", "eggroll.cli.main", *(RL if not resume else RL[:1]), *where]
            words += [] if resume else ["-g", str(self.generations)]
        else:
            words = [
                __file__,
                "--child",
                str(self.directory),
                str(self.generations),
                *["--resume"] * resume,
                *["--local"] * local,
            ]
        self.lowest = self.finished()
        with self.output.open("ab") as stream:
            self.process = subprocess.Popen([sys.executable, *words], stdout=stream, stderr=stream)

    def finished(self) -> int:
        """Generations that are in the record of updates."""
        with contextlib.suppress(OSError):
            return (self.directory / "updates.jsonl").read_bytes().count(b"\n")
        return 0

    def wait_for(self, count: int, timeout: float = 300.0) -> float:
        """Wait until ``count`` generations are finished; returns the seconds that it took."""

        def reached() -> bool:
            finished = self.finished()
            self.lowest = min(self.lowest, finished)
            return finished >= count or self._over()

        return _until(reached, timeout, f"{count} generations; {self.output} says why")

    def wait(self, timeout: float = 900.0) -> int:
        """Wait for the end; the exit status."""
        assert self.process is not None
        return self.process.wait(timeout)

    def family(self) -> list[psutil.Process]:
        """Everything that the process has started."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def digest(self) -> str:
        """Of the weights in the newest checkpoint, and of all updates."""
        newest = max((self.directory / "checkpoints").iterdir())
        parts = sorted(newest.rglob("*.safetensors"))
        assert parts, f"{newest} holds no tensors"
        digest = hashlib.sha256(newest.name.encode())
        for part in parts:
            digest.update(part.read_bytes())
        return digest.hexdigest()

    def _over(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def still_runs(self) -> None:
        """Stop unless there is something to kill."""
        if self._over():
            sys.exit(f"kills.py: the run has ended before it could be killed; {self.output} says how")


def kill_workers(run: Run, kills: int, draw: random.Random) -> Iterator[tuple[float, int]]:
    """One of two workers, again and again in one run."""
    run.start()
    run.wait_for(2)
    for _ in range(kills):
        time.sleep(draw.uniform(0, 0.5))
        run.still_runs()
        victims = [one for one in run.family() if _is(one, "ray::WorkerActo")]
        draw.choice(victims).send_signal(signal.SIGKILL)
        yield run.wait_for(run.finished() + 1), 0
    assert run.wait() == 0, run.output.read_text()


def kill_raylet(run: Run, kills: int, draw: random.Random) -> Iterator[tuple[float, int]]:
    """Ray's own process; the run has to end with a line."""

    def strike() -> float:
        began = time.monotonic()
        next(one for one in run.family() if _is(one, "raylet")).send_signal(signal.SIGKILL)
        assert run.wait() == 1, run.output.read_text()
        assert "the Ray cluster of this run is gone" in run.output.read_text().splitlines()[-1]
        return time.monotonic() - began

    return _resumed(run, kills, draw, strike)


def kill_driver(run: Run, kills: int, draw: random.Random) -> Iterator[tuple[float, int]]:
    """The process of the run; what it has started has to end."""

    def strike() -> float:
        family = run.family()
        assert run.process is not None
        run.process.kill()
        run.wait()
        return _until(lambda: not any(map(_alive, family)), 120.0, "end of the driver's processes")

    return _resumed(run, kills, draw, strike)


def kill_rl(run: Run, kills: int, draw: random.Random) -> Iterator[tuple[float, int]]:
    """A run in one process; it goes on where it was."""
    run.start()
    for _ in range(kills):
        run.wait_for(run.finished() + 1)
        time.sleep(draw.uniform(0, 0.2))
        run.still_runs()
        assert run.process is not None
        run.process.kill()
        run.wait()
        before = run.finished()
        run.start(resume=True)
        taken = run.wait_for(before + 1)
        yield taken, before - run.lowest
    assert run.wait() == 0, run.output.read_text()


def _resumed(run: Run, kills: int, draw: random.Random, strike: Callable[[], float]) -> Iterator[tuple[float, int]]:
    run.start()
    for _ in range(kills):
        run.wait_for(run.finished() + 2)
        time.sleep(draw.uniform(0, 0.5))
        run.still_runs()
        taken, before = strike(), run.finished()
        run.start(resume=True)
        run.wait_for(before + 1)
        yield taken, before - run.lowest
    assert run.wait() == 0, run.output.read_text()


def _until(condition: Callable[[], bool], timeout: float, what: str) -> float:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout:
            sys.exit(f"kills.py: waited {timeout:.0f} s in vain for {what}")
        time.sleep(0.02)
    return time.monotonic() - began


def _is(process: psutil.Process, name: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.name().startswith(name) and process.status() != psutil.STATUS_ZOMBIE
    return False


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


KILLS = {"worker": kill_workers, "raylet": kill_raylet, "driver": kill_driver, "rl": kill_rl}


def main() -> None:
    """Kill, and write what it cost."""
    if "--child" in sys.argv:
        directory, generations = sys.argv[sys.argv.index("--child") + 1 :][:2]
        run_pool(directory, int(generations), resume="--resume" in sys.argv, local="--local" in sys.argv)
        return
    made = common.parser(__doc__, model=False)
    made.add_argument("--what", nargs="+", choices=KILLS, default=list(KILLS), help="what is killed")
    made.add_argument("--kills", type=int, default=10, help="of each")
    made.add_argument("--load", type=int, default=0, help="processes that compute beside the run")
    made.add_argument("--seed", type=int, default=0, help="of the moments")
    args = common.begin(made)
    rows, digests = [], {}
    kills = 1 if args.quick else args.kills
    with tempfile.TemporaryDirectory() as folder, load(args.load):
        for what in args.what:
            kind = "rl" if what == "rl" else "pool"
            generations = max(GENERATIONS[kind], PER_KILL[kind] * kills)
            if kind not in digests:
                whole = Run(kind, Path(folder, f"{kind}-undisturbed"), generations)
                whole.start(local=True)
                assert whole.wait() == 0, whole.output.read_text()
                digests[kind] = whole.digest()
            run = Run(kind, Path(folder, what), generations)
            found = list(KILLS[what](run, kills, random.Random(args.seed)))
            same = run.digest() == digests[kind]
            lost = [generations for _, generations in found]
            case = f"{what}, {args.load} other processes"
            rows.append(
                common.row(
                    case, common.spread([taken for taken, _ in found]), target=TARGET, lower_is_better=True,
                    kills=len(found), lost=lost, same_weights=same,
                )
            )  # fmt: skip
            print(f"{len(found)} kills, lost {lost}, {'the same weights' if same else 'OTHER WEIGHTS'}")
            common.say(rows[-1])
    some = "" if set(args.what) == set(KILLS) else "-" + "-".join(args.what)  # parts of a day do not replace each other
    common.finish(f"distributed/kills{some}", MEASURE, rows, args, load=args.load, ray=ray_version())
    if not all(row["same_weights"] for row in rows):
        sys.exit("kills.py: a killed run ended with other weights")


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes that compute."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def ray_version() -> str:
    """The release of Ray."""
    from importlib.metadata import version

    return version("ray")


if __name__ == "__main__":
    main()
