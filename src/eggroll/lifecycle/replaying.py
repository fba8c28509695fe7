"""The weights of any generation of a run, from its first weights and its log."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError, RunError
from eggroll.lifecycle.kind import RunKind, Saved
from eggroll.lifecycle.opening import check_sizes, options_of_run
from eggroll.lifecycle.trust import check_replayed
from eggroll.loop import Worker
from eggroll.run.checkpoint import found, read
from eggroll.run.files import check_plain, check_tree
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
        remark: why a checkpoint that is there could not be compared, or how far the weights are from it.
        saved: where they are.
    """

    generation: int
    logged: int
    equal: bool | None
    remark: str
    saved: Saved


def rebuild(
    kind: RunKind,
    run: RunDir,
    *,
    to: int | None = None,
    options: Any = None,
    track: Track = iter,
    trust_remote_code: bool = False,
) -> tuple[Worker, int]:
    """A worker with the weights of a generation, and how many updates they hold.

    Args:
        kind: the run's kind.
        run: the run.
        to: updates; ``None`` is all that are logged.
        options: other options than the run's, for another machine; ``None`` are the run's own.
        track: shows progress.
        trust_remote_code: run code that the run's settings name, such as that of its model. The run's directory alone
            is never believed in this.

    Raises:
        RunError: the run is of another kind, has fewer updates, or needs code that is not trusted.
    """
    if options is None:
        options = check_replayed(options_of_run(kind, run.path), run, to, trust_remote_code=trust_remote_code)
    worker = kind.base(options, run)
    records: list[UpdateRecord] = []
    done = replay_run(run, records.append, to=to)
    if isinstance(getattr(options, "population_size", None), int):
        check_sizes(run, records, options.population_size)
    for record in track(records):
        worker.apply(record)
    return worker, done


def replay(
    kind: RunKind,
    run: RunDir,
    *,
    to: int | None = None,
    output: str | None = None,
    track: Track = iter,
    trust_remote_code: bool = False,
    allow_difference: bool = False,
) -> Replayed:
    """Rebuild the weights of a generation and write them to ``output`` (``RUN/replay-<generation>`` by default).

    Raises:
        RunError: as :func:`rebuild`; or the weights differ from the run's own checkpoint of that generation, unless
            ``allow_difference``. Nothing is written then.
    """
    worker, done = rebuild(kind, run, to=to, track=track, trust_remote_code=trust_remote_code)
    equal, remark = _compared(run, worker.state_tensors(), done)
    if equal is False and not allow_difference:
        raise RunError(
            f"the rebuilt weights of generation {done} differ from the run's checkpoint of it ({remark}), so they were "
            "not written. The log, the checkpoint or the base model was changed, or this is another kind of machine or "
            "another number of threads than the run's, which shows in the last digits. To write them all the same, add "
            "--allow-difference"
        )
    directory = _place(run, Path(output) if output else run.path / f"replay-{done}")
    directory.mkdir(parents=True, exist_ok=True)
    return Replayed(done, len(run.updates()), equal, remark, kind.save(worker, directory, done))


def _place(run: RunDir, directory: Path) -> Path:
    """Where the weights go. Within the run, no link is followed on the way there.

    Raises:
        RunError: there is one.
    """
    above, inside = Path(os.path.abspath(run.path)), Path(os.path.abspath(directory))
    if above in inside.parents:
        for place in reversed(inside.parents):
            if above in place.parents:
                check_plain(place, directory=True)
        check_tree(inside)
    return directory


def _compared(run: RunDir, tensors: Mapping[str, Any], generation: int) -> tuple[bool | None, str]:
    """Whether the weights equal those of a checkpoint, if there is one of this generation, and a remark."""
    path = dict(found(run.checkpoints)).get(generation)
    if path is None:
        return None, ""
    try:
        stored = read(path).load()
    except CheckpointError as error:
        return None, str(error)
    # What the log does not bring back, such as statistics of observations, is not compared.
    names = [name for name in tensors if not name.startswith("stats/") and name != "env_steps"]
    unlike = [name for name in names if name not in stored or not _same(stored[name], tensors[name])]
    if not unlike:
        return True, ""
    sizes = [_distance(stored[name], tensors[name]) for name in unlike if name in stored]
    return False, f"{len(unlike)} of {len(names)} tensors, by up to {max(sizes, default=float('nan')):.2g}"


def _distance(one: Any, other: Any) -> float:
    """The largest difference of two arrays of either library; infinite if their shapes differ."""
    first, second = (np.asarray(a.double().cpu() if hasattr(a, "equal") else a, np.float64) for a in (one, other))
    return float(abs(first - second).max(initial=0.0)) if first.shape == second.shape else float("inf")


def _same(one: Any, other: Any) -> bool:
    """Whether two arrays, of NumPy or of PyTorch, are equal."""
    if hasattr(one, "equal") and hasattr(other, "cpu"):
        return bool(one.equal(other.cpu()))
    return np.array_equal(np.asarray(one), np.asarray(other))
