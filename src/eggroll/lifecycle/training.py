"""Train or resume a run of any kind."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from eggroll._command import typed
from eggroll.core.settings import flag_of
from eggroll.distributed import RayPool
from eggroll.distributed.options import WorkerOptions
from eggroll.distributed.pool import Pool
from eggroll.errors import ConfigError, EggrollError, MissingExtraError, RunError, RunWriteError
from eggroll.lifecycle.keeping import choose, keep_of
from eggroll.lifecycle.kind import Plan, Progress, RunKind, Sitting
from eggroll.lifecycle.opening import check_code, check_not_taken, command_line, open_run
from eggroll.loop import Listener, Loop, Worker
from eggroll.run.disk import thin_checkpoints
from eggroll.run.keeping import Kept, check_patience
from eggroll.run.lock import locked
from eggroll.run.report import RESULT, write_report
from eggroll.run.run_dir import RunDir
from eggroll.run.trackers import TrackerListener, make_trackers, tracker_names


@dataclass(frozen=True)
class Opened:
    """A run that is about to go on: its plan, directory, worker, and the updates that are done."""

    kind: RunKind
    plan: Plan
    run: RunDir
    worker: Worker
    start: int


@dataclass(frozen=True)
class Trained:
    """A run after this process is done with it.

    Attributes:
        plan: what was trained.
        run: its directory.
        worker: the trained worker, in this process; after an interrupted run on a pool the pool, which is closed.
        result: what is in ``result.json``; empty if the run was interrupted.
        interrupted: whether it ended before its last generation.
        generation: updates done.
        kept: whose weights the worker holds, and the run leaves: those of the best held-out score, or the last.
    """

    plan: Plan
    run: RunDir
    worker: Any
    result: dict[str, Any]
    interrupted: bool
    generation: int
    kept: Kept


def train(
    kind: RunKind,
    options: Any,
    *,
    opened: Callable[[Opened], Iterable[Listener] | None] | None = None,
    notify: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Run all generations of a new run, or those that are left of the one that ``options.resume`` names.

    Args:
        kind: what is trained.
        options: an instance of ``kind.options``.
        opened: told when everything is set up, before the first generation; returns who is told of each generation.
        notify: told what happens to worker processes; ``None`` warns.
        progress: told of the steps in which settings are chosen.

    Raises:
        EggrollError: the plan, the worker or the run directory cannot be had, or another process is writing to it; or
            what a score raised.
    """
    tracker_names(options.report_to)
    check_not_taken(options)
    check_code(kind, options)
    with ExitStack() as held:
        if options.resume is not None:  # before a model is loaded in vain
            held.enter_context(locked(RunDir.open(options.resume).path, command_line()))
        plan = kind.plan(options)
        if plan.choose is not None:
            plan = plan.choose(notify or (lambda text: None), progress or (lambda doing, found: None))
        check_patience(options.patience, heldout=plan.heldout, eval_every=plan.eval_every)
        worker = held.enter_context(make_worker(plan, notify))
        run = open_run(kind, plan, held)
        with _way_on(kind, plan, run):
            loop = Loop(
                plan.config, worker, run, plan.heldout,
                eval_every=plan.eval_every, checkpoint_every=plan.checkpoint_every, spread_advice=plan.spread_advice,
                keep=keep_of(options), patience=options.patience,
            )  # fmt: skip
            loop.seconds = plan.seconds
            if plan.stop is not None:
                over = plan.stop
                loop.stop = lambda _: over(loop.history)
            start = loop.resume(from_checkpoint=kind.from_checkpoint) if options.resume is not None else 0
            tracker = make_trackers(options.report_to, run)
            try:
                listeners = opened(Opened(kind, plan, run, worker, start)) if opened is not None else None
                loop.listeners = [*(listeners or ()), TrackerListener(tracker)]
                began = time.perf_counter()
                # A run whose last checkpoint could not be written is complete, but for that.
                if start == 0 or start < plan.config.generations or not run.has_checkpoint(start):
                    loop.go(start)
                loop.applied = max(loop.applied, start)
                seconds = time.perf_counter() - began
            finally:
                tracker.close()
            sitting = Sitting(start, loop.applied, seconds, loop.interrupted, Kept.last(loop.applied, loop.standing))
            return _finish(kind, plan, run, worker, loop, sitting)


@contextmanager
def make_worker(plan: Plan, notify: Callable[[str], None] | None = None) -> Iterator[Worker]:
    """The worker of a plan, or a pool of them, for the length of the block.

    Raises:
        ConfigError: options about workers without any.
    """
    options = plan.options
    if options.workers is None:
        for name in ("ray_address", "worker_cpus", "worker_gpus"):
            if getattr(options, name) != getattr(WorkerOptions, name):
                raise ConfigError(f"{flag_of(name)} is for runs on workers; say how many with --workers N")
    if options.workers is None or plan.pools_itself:
        worker: Any = plan.make_worker()
    else:
        worker = RayPool(
            plan.make_worker,
            workers=options.workers,
            population_size=plan.config.population_size,
            address=options.ray_address,
            cpus_per_worker=options.worker_cpus,
            gpus_per_worker=options.worker_gpus,
            notify=notify,
            **plan.placement,
        )
    try:
        yield worker
    finally:
        if hasattr(worker, "close"):
            worker.close()


def _finish(kind: RunKind, plan: Plan, run: RunDir, worker: Any, loop: Loop, sitting: Sitting) -> Trained:
    result: dict[str, Any] = {}
    if not sitting.interrupted or (plan.finish_interrupted and sitting.generation > 0):
        kept, state = choose(plan, run, loop)
        sitting = dataclasses.replace(sitting, kept=kept)
        if isinstance(worker, Pool):
            state = worker.state_tensors() if state is None else state
            worker = plan.make_worker()
        if state is not None:
            worker.load_state_tensors(state)
        result = plan.finish(worker, run, sitting) | kept.result(sitting.interrupted)
        if result:
            run.write_file(RESULT, (json.dumps(result, indent=1) + "\n").encode())
        try:
            write_report(run, load_line=kind.load_line(run), defaults=kind.defaults())
        except MissingExtraError as error:  # everything else of the run is there
            warnings.warn(f"report.html was not written: {error}", stacklevel=2)
    if not sitting.interrupted and not kind.from_checkpoint:
        thin_checkpoints(run, (sitting.kept.generation,))
    return Trained(plan, run, worker, result, sitting.interrupted, sitting.generation, sitting.kept)


@contextmanager
def _way_on(kind: RunKind, plan: Plan, run: RunDir) -> Iterator[None]:
    """Add to an error what is left of the run, and how it goes on."""
    try:
        yield
    except EggrollError as error:
        if isinstance(error, RunError) and not isinstance(error, RunWriteError):
            raise  # it is the run that is not as it should be
        finished = len(run.updates())
        error.add_note(
            f"The run in {run.path} is intact, with {finished} finished generation{'' if finished == 1 else 's'}. When "
            f"the cause is gone, continue it: {resume_command(kind, plan, run)}"
        )
        raise


def resume_command(kind: RunKind, plan: Plan, run: RunDir) -> str:
    """The command that goes on with a run."""
    return f"{plan.command or f'{typed()} {kind.name}'} --resume {shlex.quote(str(run.path))}"
