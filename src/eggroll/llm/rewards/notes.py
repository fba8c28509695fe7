"""What TRL's trainers hand to a reward function besides the data: where the run is, and two ways to log.

An evaluator opens :func:`noting` around a batch; the rewards that are called within find its :class:`Notes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eggroll.errors import RewardError
from eggroll.llm.rewards.base import as_score, describe

if TYPE_CHECKING:
    from transformers import TrainerState

TRL_ARGUMENTS = ("trainer_state", "log_extra", "log_metric")
"""The names that TRL gives to what :meth:`Notes.arguments` returns."""


@dataclass
class Notes:
    """What reward functions log while batches are scored.

    Attributes:
        generation: updates that are done.
        generations: updates that the run shall have.
        metrics: the values logged under each name.
        extra: a value for each completion of the batch, under each column.
        reasons: why answers are unscored.
    """

    generation: int = 0
    generations: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def arguments(self, completions: int) -> dict[str, Any]:
        """``trainer_state``, ``log_extra(column, values)`` and ``log_metric(name, value)``, as TRL passes them."""

        def log_extra(column: str, values: Iterable[Any]) -> None:
            found = list(values)
            if len(found) != completions:
                raise RewardError(
                    f"log_extra({column!r}, values) got {len(found)} values for {completions} completions; it must "
                    "get one for each"
                )
            self.extra[str(column)] = [_plain(value) for value in found]

        return {"trainer_state": self._state(), "log_extra": log_extra, "log_metric": self.log_metric}

    def log_metric(self, name: str, value: Any) -> None:
        """Log a number; those under one name are averaged over the generation.

        Raises:
            RewardError: it is not a number.
        """
        self.metrics.setdefault(str(name), []).append(as_score(value, f"log_metric({name!r}, value)"))

    def take_extra(self) -> dict[str, list[Any]]:
        """The columns that were logged since the last call."""
        taken, self.extra = self.extra, {}
        return taken

    def means(self, prefix: str) -> dict[str, float]:
        """The mean of each metric, over its finite values; NaN without any."""
        found = {}
        for name, values in self.metrics.items():
            finite = [value for value in values if math.isfinite(value)]
            found[prefix + name] = math.fsum(finite) / len(finite) if finite else math.nan
        return found

    def _state(self) -> TrainerState:
        from transformers import TrainerState

        # An epoch has no meaning where each generation takes a batch of its own, so it is the part of the run.
        done = self.generation / self.generations if self.generations else 0.0
        return TrainerState(global_step=self.generation, max_steps=self.generations, epoch=done, num_train_epochs=1)


_CURRENT: ContextVar[Notes | None] = ContextVar("eggroll_reward_notes", default=None)


@contextmanager
def noting(generation: int, generations: int) -> Iterator[Notes]:
    """Collect what the rewards in the block log."""
    notes = Notes(generation, generations)
    token = _CURRENT.set(notes)
    try:
        yield notes
    finally:
        _CURRENT.reset(token)


def current_notes() -> Notes:
    """The notes of the evaluator that is scoring; outside of one, notes that nobody reads."""
    return _CURRENT.get() or Notes()


def check_columns(what: str, missing: Iterable[str], there: Iterable[str]) -> None:
    """Refuse a function that asks for arguments that nobody has.

    Raises:
        RewardError: something is missing.
    """
    missing = list(missing)
    if missing:
        raise RewardError(
            f"{what} asks for {', '.join(missing)}; there are {', '.join(there)}. Add the column to the data set, or "
            "give the parameter a default"
        )


def with_extra(row: Mapping[str, Any], extra: Mapping[str, list[Any]], index: int) -> dict[str, Any]:
    """A row of ``samples.jsonl`` with what was logged for its completion."""
    return {**row, "logged": {name: values[index] for name, values in extra.items()}} if extra else dict(row)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: itself, or its text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        item: Callable[[], Any] | None = getattr(value, "item", None)
        try:
            return item() if item is not None else describe(value)
        except Exception:
            return describe(value)
    return value
