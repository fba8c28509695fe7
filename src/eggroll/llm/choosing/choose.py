"""Choose what a run of ``eggroll tune`` was not told: sigma, the learning rate, and what fits into its time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eggroll.core.check import is_number
from eggroll.core.settings import flag_of, narrowed
from eggroll.errors import ConfigError
from eggroll.lifecycle.kind import Progress
from eggroll.llm.backends.worker import LanguageWorker, ModelWorker
from eggroll.llm.choosing.auto import automatic, with_stand_ins
from eggroll.llm.choosing.budget import Amount, fit
from eggroll.llm.choosing.calibrate import MEMBERS, Calibration, calibrate, starting_sigma
from eggroll.llm.choosing.step import learning_rate, relative_step
from eggroll.llm.config import EggrollConfig
from eggroll.run.console import duration
from eggroll.run.run_dir import RunDir

CHOSEN = "chosen"
"""The key of ``environment.json`` that holds what was measured and chosen."""
GENERATION = 0
"""Whose prompts and noise are tried: those of the first one, which a run needs anyway."""

SHARE = 0.15
"""Of the run's time, after which no larger sigma is tried."""


class CalibrationWarning(UserWarning):
    """What the evaluations before a run say about its score."""


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        options: with a number in each place.
        calibration: what was measured; ``None`` where nothing had to be.
        lines: what was chosen and why, one line each.
        warning: what a person should know; empty if there is nothing.
    """

    options: Any
    calibration: Calibration | None
    lines: tuple[str, ...]
    warning: str = ""

    def record(self) -> dict[str, Any]:
        """For the run's directory."""
        return {"lines": list(self.lines)} | ({} if self.calibration is None else self.calibration.record())


def choose(
    options: Any, worker: ModelWorker, *, prompts: int, heldout: int, notify: Callable[[str], None],
    progress: Progress = lambda doing, found: None,
) -> Choice:  # fmt: skip
    """Evaluate a few members of a new run's worker, and choose what is ``auto``.

    Args:
        options: as given.
        worker: made from them with stand-ins; its evaluations are those of a run.
        prompts: how many there are to train on.
        heldout: how many are held out.
        notify: told what is going on.
        progress: told of each sigma that is tried.

    Returns:
        The choice; its population and prompts may be others than the worker's, which has to be made anew then.
    """
    auto, chosen = automatic(options), with_stand_ins(options)
    lines: list[str] = []
    calibration, warning = None, ""
    if "sigma" in auto or options.minutes is not None:
        notify("choosing settings: evaluating a few members at several sizes of perturbation")
        calibration = _calibrate(chosen, worker, progress, fixed="sigma" not in auto)
        warning = calibration.warning
    if calibration is not None and "sigma" in auto:
        chosen = dataclasses.replace(chosen, sigma=calibration.sigma)
        members = calibration.chosen.members
        tried = f"of {len(calibration.levels)} tried on {members} members and {calibration.prompts} prompts"
        lines.append(f"sigma {chosen.sigma:g} ({tried}: {calibration.reason})")
    if calibration is not None and options.minutes is not None:
        left = options.minutes * 60 - calibration.seconds
        wanted = Amount(chosen.generations, chosen.population_size, chosen.prompts_per_generation)
        cell = calibration.chosen.seconds / calibration.prompts
        free = auto if isinstance(worker, LanguageWorker) and chosen.backend == "torch" else auto & {"generations"}
        if chosen.group_size or chosen.elite_k:  # numbers that go with a population's size
            free = free - {"population_size"}
        found = fit(wanted, free, seconds=left, cell_seconds=cell, prompts=prompts, heldout=heldout)
        chosen = dataclasses.replace(
            chosen, generations=found.generations, population_size=found.members, prompts_per_generation=found.prompts
        )
        each = min(found.prompts, prompts)
        seconds = found.members * each * cell
        lines.append(
            f"{found.generations} generations of {found.members} members on {each} prompts, about "
            f"{seconds:.3g} s each, for {options.minutes:g} minutes"
        )
    elif calibration is not None and "generations" in auto:
        seconds = chosen.population_size * calibration.chosen.seconds
        lines.append(
            f"{chosen.generations} generations of about {seconds:.3g} s each, {duration(seconds * chosen.generations)} "
            "together (-g or --minutes makes it fewer)"
        )
    if "lr" in auto:
        if "lr_schedule" in auto and chosen.lr_decay == 1.0:  # else it is asked for a decay of its own
            chosen = dataclasses.replace(chosen, lr_schedule="linear")
        config = narrowed(chosen, EggrollConfig)
        deviation = calibration.chosen.deviation if calibration is not None else 1.0
        chosen = dataclasses.replace(chosen, lr=learning_rate(config, deviation or 1.0))
        step = relative_step(narrowed(chosen, EggrollConfig))
        lines.append(
            f"lr {chosen.lr:g}, {chosen.lr_schedule} (first steps of up to {step:.2g} sigma per entry, over "
            f"{chosen.generations} generations)"
        )
    return Choice(chosen, calibration, tuple(lines), warning)


def check_auto(options: Any) -> None:
    """Refuse to choose anew for a run that has begun.

    Raises:
        ConfigError: a resumed run's settings are ``auto``.
    """
    names = sorted(automatic(options))
    if options.resume is not None and names:
        raise ConfigError(
            f"{flag_of(names[0])} auto chooses for a new run, and the run in {options.resume} has its settings; leave "
            "it out"
        )


def seconds_left(options: Any, choice: Choice | None) -> float | None:
    """What ``--minutes`` leaves for the generations of a run: all of it but the time that choosing took."""
    if options.minutes is None:
        return None
    spent = 0.0
    if choice is not None and choice.calibration is not None:
        spent = choice.calibration.seconds
    elif options.resume is not None:
        known = RunDir.open(options.resume).environment.get(CHOSEN)
        spent = known.get("seconds", 0.0) if isinstance(known, dict) else 0.0
    return max(0.0, options.minutes * 60 - (spent if is_number(spent) else 0.0))


def _calibrate(options: Any, worker: ModelWorker, progress: Progress, *, fixed: bool) -> Calibration:
    members = min(MEMBERS, options.population_size) // 2 * 2
    relative = options.quantized_update == "scales"
    shapes = [] if relative else [spec.matrix_shape for spec in worker.setup.specs if spec.low_rank]
    start = options.sigma if fixed else starting_sigma(shapes)
    seconds = math.inf if options.minutes is None else SHARE * options.minutes * 60
    return calibrate(
        lambda sigma, members: worker.evaluate(GENERATION, sigma, members),
        members, start, only_start=fixed, seconds=seconds, progress=progress,
    )  # fmt: skip
