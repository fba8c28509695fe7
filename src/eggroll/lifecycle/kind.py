"""What a kind of run is: its options, and how they become a worker and a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eggroll.core.config import ESConfig
from eggroll.core.reading import Kind
from eggroll.loop import SPREAD_ADVICE, Worker
from eggroll.run.keeping import Kept
from eggroll.run.run_dir import RunDir

Progress = Callable[[str, str], None]
"""Told what is done now (empty at the end), and what the step before it found."""


@dataclass(frozen=True)
class Sitting:
    """What this process has done of a run.

    Attributes:
        start: updates that were done before.
        generation: updates that are done now.
        seconds: spent in the loop.
        interrupted: Ctrl-C or SIGTERM ended it.
        kept: whose weights the worker holds now.
    """

    start: int
    generation: int
    seconds: float
    interrupted: bool
    kept: Kept


def _no_result(worker: Any, run: RunDir, sitting: Sitting) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before anything of it is on disk. Whatever cannot work has failed by now.

    Attributes:
        options: as given, with everything that was chosen automatically filled in: what ``config.json`` keeps.
        config: the algorithm's settings.
        make_worker: makes the worker, in this process or in another one (it travels by cloudpickle).
        finish: ``finish(worker, run, sitting)`` with the trained worker in this process; returns what ``result.json``
            holds.
        title: of the display.
        name: of the default run directory, without the time.
        heldout: whether there is held-out data.
        eval_every: generations between held-out scores.
        checkpoint_every: generations between checkpoints.
        stop: asked after each generation, given the metrics of all that are done; true ends the run.
        describe: lines about the run, given the worker (or the pool of workers).
        command: the command line up to ``--resume``.
        facts: more entries for ``environment.json``.
        fingerprints: digests of what the run reads, such as its data and its model; a resumed run must have the same
            ones, unless it is told to ``accept_changes``. Those of programs that options name are added to them.
        placement: more arguments of :class:`eggroll.distributed.RayPool`.
        pools_itself: ``make_worker`` makes a pool where the options ask for workers.
        spread_advice: what to try when all members of a generation score the same.
        finish_interrupted: whether ``finish`` is called after an interrupt, too.
        choose: given who is told of it and of its steps, evaluates a little and returns the plan with every setting
            chosen; ``None`` if there is nothing to choose. Called for new runs only, before anything is on disk.
        seconds: for all generations of the run, resumed ones included: it ends after the last one that fits.
    """

    options: Any
    config: ESConfig
    make_worker: Callable[[], Worker]
    finish: Callable[[Any, RunDir, Sitting], dict[str, Any]] = _no_result
    title: str
    name: str
    heldout: bool = True
    eval_every: int = 10
    checkpoint_every: int = 10
    stop: Callable[[list[dict[str, Any]]], bool] | None = None
    describe: Callable[[Any], Sequence[str]] = lambda worker: ()
    command: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    placement: Mapping[str, Any] = field(default_factory=dict)
    pools_itself: bool = False
    spread_advice: str = SPREAD_ADVICE
    finish_interrupted: bool = False
    choose: Callable[[Callable[[str], None], Progress], Plan] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Saved:
    """Weights on disk: what they are (``model``, ``policy``, ...), where, and the Python lines that load them."""

    what: str
    path: Path
    load: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class RunKind:
    """One kind of run, such as ``tune``, ``rl`` or ``recipe mnist``.

    Attributes:
        name: what follows ``eggroll`` on the command line; stored in ``config.json``.
        options: a dataclass that composes the algorithm's config, ``RunOptions`` and ``WorkerOptions``.
        plan: loads and checks what the options name; raises before anything is on disk.
        base: the worker as the run began with it, for a replay; it needs no data. Given the options and the run.
        save: ``save(worker, directory, generation)`` writes a replayed worker's weights.
        load_line: Python that loads what a run has saved, or the command that uses it, or ``None``.
        measured: numbers that each generation's line of ``metrics.jsonl`` must have for the run to go on, besides those
            of every kind.
        retired: names in old runs' settings that are no settings any more.
        from_checkpoint: its updates need more than the log's records, so a resumed run goes back to its newest
            checkpoint.
    """

    name: str
    options: type[Any]
    plan: Callable[[Any], Plan]
    base: Callable[[Any, RunDir], Worker]
    save: Callable[[Any, Path, int], Saved]
    load_line: Callable[[RunDir], str | None] = lambda run: None
    measured: Mapping[str, Kind] = field(default_factory=dict)
    retired: Sequence[str] = ()
    from_checkpoint: bool = False

    def defaults(self) -> dict[str, Any]:
        """The settings that have a default, by name: a report marks those of a run that are not these."""
        fields = dataclasses.fields(self.options)
        return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
