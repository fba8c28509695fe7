"""The weights of any generation of a run, from its first weights and its log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError
from eggroll.lifecycle.kind import RunKind, Saved
from eggroll.lifecycle.opening import options_of_run
from eggroll.loop import Worker
from eggroll.run.checkpoint import found, read
from eggroll.run.replay import replay_run
from eggroll.run.run_dir import RunDir

Track = Callable[[Iterable[UpdateRecord]], Iterable[UpdateRecord]]


@dataclass(frozen=True)
class Replayed:
    """Rebuilt weights.

    Attributes:
        generation: updates that they hold.
        logged: updates in the run's log.
        equal: whether they equal the checkpoint of that generation, bit for bit; ``None`` if there is none to compare.
        damage: why a checkpoint that is there could not be compared; empty otherwise.
        saved: where they are.
    """

    generation: int
    logged: int
    equal: bool | None
    damage: str
    saved: Saved


def rebuild(
    kind: RunKind, run: RunDir, *, to: int | None = None, options: Any = None, track: Track = iter
) -> tuple[Worker, int]:
    """A worker with the weights of a generation, and how many updates they hold.

    Args:
        kind: the run's kind.
        run: the run.
        to: updates; ``None`` is all that are logged.
        options: other options than the run's, for another machine; ``None`` are the run's own.
        track: shows progress.

    Raises:
        RunError: it is another kind's run, or has not so many updates.
    """
    worker = kind.base(options or options_of_run(kind, run.path), run)
    records: list[UpdateRecord] = []
    done = replay_run(run, records.append, to=to)
    for record in track(records):
        worker.apply(record)
    return worker, done


def replay(
    kind: RunKind, run: RunDir, *, to: int | None = None, output: str | None = None, track: Track = iter
) -> Replayed:
    """Rebuild the weights of a generation and write them to ``output`` (``RUN/replay-<generation>`` by default)."""
    worker, done = rebuild(kind, run, to=to, track=track)
    directory = Path(output) if output else run.path / f"replay-{done}"
    directory.mkdir(parents=True, exist_ok=True)
    equal, damage = _compared(run, worker.state_tensors(), done)
    return Replayed(done, len(run.updates()), equal, damage, kind.save(worker, directory, done))


def _compared(run: RunDir, tensors: Mapping[str, Any], generation: int) -> tuple[bool | None, str]:
    """Whether the weights equal those of a checkpoint, if there is one of this generation."""
    path = dict(found(run.checkpoints)).get(generation)
    if path is None:
        return None, ""
    try:
        stored = read(path).load()
    except CheckpointError as error:
        return None, str(error)
    # What the log does not bring back, such as statistics of observations, is not compared.
    names = [name for name in tensors if not name.startswith("stats/") and name != "env_steps"]
    return all(name in stored and _same(stored[name], tensors[name]) for name in names), ""


def _same(one: Any, other: Any) -> bool:
    """Whether two arrays, of NumPy or of PyTorch, are equal."""
    return bool(one.equal(other.cpu()) if hasattr(one, "equal") else (one == other).all())
