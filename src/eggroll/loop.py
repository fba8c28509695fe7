"""The one generation loop: ask, evaluate, shape, tell, log, checkpoint, stop.

Whatever is trained (a language model, a policy, any module), a run is its first weights plus a small log: each
generation's record goes to the log before it is applied, so a run that is killed continues from the last checkpoint
and the records after it, bit for bit.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from eggroll.core.config import ESConfig
from eggroll.core.reading import NUMBER, check_fields
from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError, EggrollError, RewardError, RunError
from eggroll.run.interrupt import terminate_as_interrupt, uninterrupted
from eggroll.run.keeping import Keep, Standing
from eggroll.run.provenance import memory_used
from eggroll.run.signs import Signs

if TYPE_CHECKING:
    from eggroll.run.checkpoint import Checkpoint
    from eggroll.run.run_dir import RunDir

SPREAD_ADVICE = "a score with more steps in between, or a larger sigma"
"""What to try when members score the same, for any kind of run."""


class NoSpreadWarning(UserWarning):
    """All members of a generation scored the same, so there was nothing to learn from it."""


@dataclass(frozen=True)
class Evaluation:
    """A generation's scores and what they cost.

    Attributes:
        fitness: ``(N,)`` or ``(N, prompts)`` raw scores, higher is better.
        metrics: further numbers for the log, units in their names.
        tokens: tokens processed or generated, 0 if the word has no meaning.
        samples: rows for ``samples.jsonl``.
        totals: sums over the evaluated members, numbers or arrays. Those of several ranges are added up and reach every
            replica with the update's record; the log has running counts of those that are numbers.
    """

    fitness: NDArray[np.floating[Any]]
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Heldout:
    """The center's score on held-out data.

    Attributes:
        reward: mean score, higher is better.
        samples: rows for ``samples.jsonl``.
        metrics: further numbers for the log.
    """

    reward: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


class Worker(Protocol):
    """Everything that evolves: one replica of the center, with what it needs to score members.

    A PyTorch module, a vLLM engine, a policy in JAX, an integer language model, and a pool of other workers are all
    workers. Those that start from the same weights and apply the same records have the same weights again, bit for
    bit: that is all that keeps a pool of them together.

    One that also has ``update_cosine`` (see :class:`eggroll.core.turning.Turning`) has it logged after each update.
    """

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score some members.

        Args:
            generation: the generation, from 0; with ``members`` it is the address of the noise.
            sigma: standard deviation of the perturbations.
            members: consecutive members; both of an antithetic pair are in the same range.

        Returns:
            An evaluation whose fitness is ``(len(members),)`` or ``(len(members), prompts)``. It may depend on nothing
            but the arguments and the center: the same range may be asked for twice, of any worker.

        Raises:
            EggrollError: the score cannot be computed; it ends the run as it is, and is not tried again.
        """
        ...

    def heldout(self, generation: int) -> Heldout:
        """The center's score on held-out data, after ``generation`` updates."""
        ...

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        ...

    def state_tensors(self) -> Mapping[str, Any]:
        """Everything that the next update depends on: names to tensors (PyTorch or NumPy)."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`; tensors from a checkpoint are PyTorch's.

        They may be shared, read-only memory: copy out of them.
        """
        ...


class Listener(Protocol):
    """Who is told about a run while it goes on: the live display, trackers, a user's callback.

    One that also has ``message(text)`` is told what a person should know; without any such listener it is a warning.
    One that has ``samples(rows)`` is shown rows of ``samples.jsonl`` before the metrics that they belong to.
    """

    def generation(self, metrics: dict[str, Any]) -> None:
        """One generation is done."""
        ...


@dataclass
class Loop:
    """Everything that a run of generations needs.

    Args:
        config: the algorithm's settings.
        worker: what evolves.
        run: where logs and checkpoints go, or ``None`` for none.
        heldout: whether the center is scored on held-out data before, during and after.
        eval_every: generations between held-out scores (the start and the end always have one).
        checkpoint_every: generations between checkpoints; with a run directory there is always one at the end.
        listeners: told of each generation's metrics.
        spread_advice: what to try when all members score the same.
        stop: asked about each generation's metrics when it is done; true ends the run early. A run that goes on is
            asked about its last generation again: a budget may be used up, and a kill may have come before the answer.
        seconds: for all generations; the run ends after the last one that fits.
        keep: ``best`` makes a checkpoint of each generation whose held-out score is the best so far, and keeps it until
            a better one comes.
        patience: held-out evaluations in a row that may fail to beat the best before the run ends early; 0 never ends.
    """

    config: ESConfig
    worker: Worker
    run: RunDir | None = None
    heldout: bool = False
    eval_every: int = 10
    checkpoint_every: int = 10
    listeners: list[Listener] = field(default_factory=list)
    stop: Callable[[dict[str, Any]], bool] | None = None
    spread_advice: str = SPREAD_ADVICE
    seconds: float | None = None
    keep: Keep = "last"
    patience: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False
    applied: int = 0
    standing: Standing = field(default_factory=Standing)
    """The held-out scores so far."""
    _signs: Signs = field(init=False, repr=False)
    _spreads: list[bool] = field(default_factory=list, init=False, repr=False)
    """Of each generation that this loop knows, whether its weights tell members apart."""

    def resume(self, *, from_checkpoint: bool = False) -> int:
        """Bring the worker to the state after the last logged generation; returns how many are done.

        Args:
            from_checkpoint: go back to the newest checkpoint, for workers that need more than the log's records to take
                an update (``totals``); the generations after it are evaluated again, with the same result.
        """
        if self.run is None:
            return 0
        checkpoint = self.run.latest_checkpoint()
        if from_checkpoint:
            self.run.rewind(checkpoint.generation if checkpoint else 0)
        start = 0
        if checkpoint is not None:
            self._load(checkpoint)
            start = checkpoint.generation
        records, lines = self.run.updates(), self.run.metrics()
        # A crash between a generation's record and its metrics: it is done again, with the same result.
        logged = max((int(line["generation"]) for line in lines), default=0)
        done = max(start, min(len(records), logged))
        for record in records[start:done]:
            self.worker.apply(record)
        self.run.rewind(done)
        self._spreads = [has_spread(self.config, record.weights) for record in records[:done]]
        lines = self.run.metrics()
        self.history, self.standing = [line for line in lines if "event" not in line], Standing.of(lines)
        self.applied = done
        return done

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            self.worker.load_state_tensors(checkpoint.load())
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, EggrollError):
                raise
            raise CheckpointError(
                f"the checkpoint {checkpoint.path} does not fit this run: {type(error).__name__}: {error}. It is of "
                "another model, or was changed; move it away to go on from the one before"
            ) from error

    def go(self, start: int = 0) -> list[dict[str, Any]]:
        """Run generations ``start`` to ``config.generations``; returns the history of metrics.

        Ctrl-C (or SIGTERM) ends the run after the generation in progress has been given up: the state is that after
        the last complete one, and a checkpoint of it is written. ``interrupted`` is true then.

        Raises:
            RewardError: a score failed, or no score of a generation is a number. What is done has a checkpoint then.
        """
        began = time.perf_counter()
        members = range(self.config.population_size)
        self.applied, self._signs = start, Signs(self.config, start)
        with terminate_as_interrupt():
            try:
                if start == 0:
                    self._log_start()
                elif self._is_best(start):  # a kill came between its score and its checkpoint
                    self._checkpoint(start)
                was_over = start > 0 and bool(self.history) and self._is_over(self.history[-1])
                before = time_spent(self.history)
                was_over = was_over or (start > 0 and self._time_is_up(before, before / start))
                for generation in range(start, start if was_over else self.config.generations):
                    sigma = self.config.sigma_at(generation)
                    evaluate_start = time.perf_counter()
                    evaluation = self.worker.evaluate(generation, sigma, members)
                    seconds = time.perf_counter() - evaluate_start
                    metrics: dict[str, Any] = {}
                    try:
                        with uninterrupted():
                            metrics = self._update(generation, sigma, evaluation, seconds)
                        now = time.perf_counter()
                        time_is_up = self._time_is_up(before + now - began, now - evaluate_start)
                        self._evaluate_when_due(metrics, generation + 1, ending=time_is_up)
                    finally:
                        if metrics:  # the update has been taken, even if Ctrl-C has come since
                            metrics["elapsed_s"] = time.perf_counter() - began
                            self.history.append(metrics)
                            with uninterrupted():
                                self._log(metrics)
                    self._say_first_without_spread(evaluation.fitness, start)
                    for text in self._signs.texts(self.history, self.standing):
                        self._tell(text)
                    if self._due(generation + 1, self.checkpoint_every) or self._is_best(generation + 1):
                        self._checkpoint(generation + 1)
                    if self._is_over(metrics) or time_is_up:
                        break
            except KeyboardInterrupt:
                self.interrupted = True
            except RewardError:  # raised between updates: the state is that after the last complete generation
                if self.applied > start:
                    with suppress(EggrollError):  # the reward's error is the one to show
                        self._checkpoint(self.applied)
                raise
        if self.applied > 0:
            self._checkpoint(self.applied)
        self._say_without_spread(start)
        if self.stopped_early:
            self._say(self.standing.why_over())
        return self.history

    def _time_is_up(self, spent: float, generation_s: float) -> bool:
        """Whether one more generation would end beyond the budget by more than half of itself."""
        return self.seconds is not None and spent + generation_s / 2 > self.seconds

    @property
    def stopped_early(self) -> bool:
        """Whether patience has ended the run, or would not let it go on."""
        return self.applied < self.config.generations and self.standing.is_over(self.patience)

    def _is_over(self, metrics: dict[str, Any]) -> bool:
        return self.standing.is_over(self.patience) or (self.stop is not None and self.stop(metrics))

    def _is_best(self, generation: int) -> bool:
        best = self.standing.best
        return self.keep == "best" and best is not None and best[0] == generation

    def _update(self, generation: int, sigma: float, evaluation: Evaluation, seconds: float) -> dict[str, Any]:
        """Shape, log, apply: from the log entry to the new weights and their metrics there is no way out half-way."""
        config, lr = self.config, self.config.lr_at(generation)
        start = time.perf_counter()
        check_scores(generation, evaluation)
        weights = config.shape(evaluation.fitness)
        record = UpdateRecord.make(generation, sigma, lr, weights, totals=evaluation.totals)
        if self.run is not None:
            self.run.append_update(record)
        norm = self.worker.apply(record)
        self.applied = generation + 1
        self._spreads.append(has_spread(config, weights))
        cosine: float | None = getattr(self.worker, "update_cosine", None)
        self._log_samples(generation + 1, evaluation.samples)
        return {
            "generation": generation + 1,
            **fitness_metrics(evaluation.fitness),
            **self._signs.measure(evaluation.fitness),
            "sigma": sigma,
            "lr": lr,
            "update_norm": norm,
            **({} if cosine is None else {"update_cosine": cosine}),
            "members_per_s": config.population_size / max(seconds, 1e-9),
            **({"tokens_per_s": evaluation.tokens / max(seconds, 1e-9)} if evaluation.tokens else {}),
            "evaluate_s": seconds,
            "update_s": time.perf_counter() - start,
            **memory_used(),
            **evaluation.metrics,
            **config.weight_metrics(weights),
            **self._counts(evaluation.totals),
        }

    def _counts(self, totals: Mapping[str, Any]) -> dict[str, float]:
        """Totals that are numbers, counted from the beginning of the run."""
        before = self.history[-1] if self.history else {}
        counts = {name: float(value) for name, value in totals.items() if np.ndim(value) == 0}
        try:
            check_fields(before, optional=dict.fromkeys(counts, NUMBER))
        except ValueError as error:
            where = f"{self.run.path}/metrics.jsonl" if self.run is not None else "the history"
            raise RunError(f"{where}, generation {before['generation']}: {error}; restore it") from None
        return {name: before.get(name, 0.0) + value for name, value in counts.items()}

    def _evaluate_when_due(self, metrics: dict[str, Any], generation: int, *, ending: bool = False) -> None:
        last = ending or generation == self.config.generations
        if self.heldout and (last or self._due(generation, self.eval_every)):
            self._evaluate_heldout(metrics, generation)

    def _evaluate_heldout(self, metrics: dict[str, Any], generation: int) -> None:
        result = self.worker.heldout(generation)
        if math.isfinite(result.reward):
            metrics["heldout_reward"] = result.reward
            self.standing.add(generation, result.reward)
        metrics.update(result.metrics)
        self._log_samples(generation, result.samples)

    def _log_samples(self, generation: int, samples: list[dict[str, Any]]) -> None:
        rows = [{"generation": generation, **row} for row in samples]
        if self.run is not None and rows:
            self.run.append_samples(rows)
        for listener in self.listeners if rows else ():
            show = getattr(listener, "samples", None)
            if show is not None:
                show(rows)

    def _log_start(self) -> None:
        if not self.heldout:
            return
        metrics: dict[str, Any] = {"generation": 0, "event": "start"}
        self._evaluate_heldout(metrics, 0)
        self._log(metrics)

    def _log(self, metrics: dict[str, Any]) -> None:
        if self.run is not None:
            self.run.append_metrics(metrics)
        for listener in self.listeners:
            listener.generation(metrics)

    def _tell(self, text: str) -> bool:
        """Tell those who listen; whether there are any."""
        tellers = [listener.message for listener in self.listeners if hasattr(listener, "message")]
        for tell in tellers:
            tell(text)
        return bool(tellers)

    def _say(self, text: str, category: type[Warning] = UserWarning) -> None:
        if not self._tell(text):
            warnings.warn(text, category, stacklevel=4)

    def _say_first_without_spread(self, fitness: NDArray[np.floating[Any]], start: int) -> None:
        """Say it at the first such generation since ``start``, and no more until the end."""
        here = self._spreads[-(self.applied - start) :]
        if here[-1] or not all(here[:-1]):
            return
        table = np.asarray(fitness).reshape(len(fitness), -1)
        same = np.array_equal(table, np.broadcast_to(table[:1], table.shape), equal_nan=True)
        what = (
            f"all {len(table)} members scored the same"
            if same
            else "the scores differ, but not where they count (within a pair, or among the best)"
        )
        self._say(
            f"generation {self.applied} has no spread: {what}, so there is nothing to learn from it. Unless this is "
            f"the best score there is, try {self.spread_advice}",
            NoSpreadWarning,
        )

    def _say_without_spread(self, start: int) -> None:
        """At the end: how many generations taught nothing, if any has since ``start``."""
        without = self._spreads.count(False)
        if all(self._spreads[len(self._spreads) - (self.applied - start) :]):
            return
        self._say(
            f"{without} of {len(self._spreads)} generations had no spread: all their members scored the same, so "
            f"nothing was learned from them. Unless that was the best score there is, try {self.spread_advice}",
            NoSpreadWarning,
        )

    def _checkpoint(self, generation: int) -> None:
        if self.run is None:
            return
        if self.run.has_checkpoint(generation):
            return
        with uninterrupted():
            best = self.standing.best if self.keep == "best" else None
            self.run.save_checkpoint(
                generation,
                self.worker.state_tensors(),
                {"config": self.config.to_dict()},
                also=() if best is None else (best[0],),
            )

    @staticmethod
    def _due(generation: int, every: int) -> bool:
        return every > 0 and generation % every == 0


def time_spent(history: Sequence[Mapping[str, Any]]) -> float:
    """Seconds in the loop of all sittings: ``elapsed_s`` begins again at 0 in each of them."""
    elapsed = [float(line.get("elapsed_s", 0.0)) for line in history]
    ends = [now for now, after in pairwise([*elapsed, 0.0]) if after < now]
    return sum(ends)


def has_spread(config: ESConfig, weights: NDArray[np.floating[Any]]) -> bool:
    """Whether the weights of a generation tell its members apart: those of one pair, if it is made of pairs."""
    if len(weights) != config.population_size:  # one weight for a pair
        return bool(np.any(weights))
    if config.antithetic:
        return bool(np.any(weights[0::2] != weights[1::2]))
    return bool(np.any(weights != weights[0]))


def check_scores(generation: int, evaluation: Evaluation) -> None:
    """Refuse a generation without a single score that is a number.

    Raises:
        RewardError: with what the scores are instead.
    """
    scores = np.asarray(evaluation.fitness, dtype=np.float64).ravel()
    if np.isfinite(scores).any():
        return
    kinds = {"None or NaN": np.isnan(scores), "inf": scores == np.inf, "-inf": scores == -np.inf}
    found = [what for what, where in kinds.items() if where.any()]
    text = evaluation.samples[0].get("completion") if evaluation.samples else None
    example = "" if text is None else f", the first of them for {text if len(text) <= 80 else text[:77] + '...'!r}"
    raise RewardError(
        f"generation {generation + 1}: not one of its {scores.size} scores is a number; the reward returned "
        f"{' and '.join(found)} for all of them{example}. Return a finite number for at least some: those without one "
        "count as the worst"
    )


def fitness_metrics(fitness: NDArray[np.floating[Any]]) -> dict[str, float]:
    """Mean, extremes and spread of the members' scores; NaN and infinities are counted, not averaged.

    A member's score is the mean over its prompts that have one. Where no member has any, only the count is given.
    """
    values = np.asarray(fitness, dtype=np.float64)
    table = values.reshape(values.shape[0], -1)
    valid = np.isfinite(table)
    invalid = int((~valid).sum())
    counts = valid.sum(axis=1)
    finite = (np.where(valid, table, 0.0).sum(axis=1) / np.maximum(counts, 1))[counts > 0]
    if finite.size == 0:
        return {"invalid_scores": invalid}
    return {
        "fitness_mean": float(finite.mean()),
        "fitness_max": float(finite.max()),
        "fitness_min": float(finite.min()),
        "fitness_std": float(finite.std()),
        "invalid_scores": invalid,
        "scores": table.size,
    }


__all__ = ["Evaluation", "Heldout", "Listener", "Loop", "NoSpreadWarning", "Worker", "fitness_metrics"]
