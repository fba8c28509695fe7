"""The runs in a folder: what each is, how far it has come, and how well it does."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from eggroll.errors import ConfigError, EggrollError, RunError
from eggroll.run.console import duration, number
from eggroll.run.lock import holder
from eggroll.run.report.view import RunView
from eggroll.run.run_dir import CONFIG, ENVIRONMENT, RunDir

COLUMNS = ("name", "kind", "model", "task", "generations", "best", "last", "state", "age")
RUNNING, FINISHED, ENDED, STOPPED, BROKEN = "running", "finished", "ended", "stopped", "broken"
GIVE = "Give the folder that runs are in; commands put theirs in runs/"
_CONDITION = re.compile(rf"({'|'.join(COLUMNS)})\s*(=|>|<)\s*(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        name: of its directory.
        kind: the command that started it, such as ``tune``.
        model: what evolves, or the environment.
        task: what it is scored on.
        generations: updates done, as far as they are logged.
        total: updates that it shall have; ``None`` if that is not known.
        best, last: held-out scores, higher is better; ``None`` without any. Bits per byte are negative here.
        state: ``running``, ``finished``, ``ended`` (its goal was reached, or its budget used up), ``stopped`` or
            ``broken``.
        started: seconds since 1970.
        trouble: why it is broken.
        bits: whether the scores are minus bits per byte, which are shown without the sign.
    """

    name: str
    kind: str = ""
    model: str = ""
    task: str = ""
    generations: int = 0
    total: int | None = None
    best: float | None = None
    last: float | None = None
    state: str = BROKEN
    started: float = 0.0
    trouble: str = ""
    bits: bool = False

    def cells(self, now: float) -> list[str]:
        """What is shown under :data:`COLUMNS`."""
        done = f"{self.generations}" if self.total is None else f"{self.generations}/{self.total}"
        scores = [self._score(self.best), self._score(self.last)]
        age = duration(max(0.0, now - self.started)) if self.started else ""
        return [self.name, self.kind, self.model, self.task, "" if self.trouble else done, *scores, self.state, age]

    def _score(self, value: float | None) -> str:
        return "" if value is None else f"{number(-value)} bits" if self.bits else number(value)

    def value(self, column: str) -> float | str:
        """What a column is sorted by, the first one first: the best scores, the longest runs, the newest."""
        if column in ("best", "last"):
            found = self.best if column == "best" else self.last
            return float("inf") if found is None else -found
        if column == "generations":
            return -self.generations
        return -self.started if column == "age" else str(getattr(self, column)).lower()

    def holds(self, condition: str, now: float) -> bool:
        """Whether a condition of :func:`chosen` is true of this run."""
        parts = _CONDITION.fullmatch(condition.strip())
        if parts is None:
            return any(condition.lower() in cell.lower() for cell in self.cells(now))
        column, sign, wanted = parts[1].lower(), parts[2], parts[3].strip()
        if sign == "=":
            return wanted.lower() in self.cells(now)[COLUMNS.index(column)].lower()
        value = self._number(column, now)
        limit = _limit(condition, column, wanted)
        return value is not None and (value > limit if sign == ">" else value < limit)

    def _number(self, column: str, now: float) -> float | None:
        if column == "age":
            return now - self.started
        found: float | None = getattr(self, column)
        return -found if self.bits and found is not None and column in ("best", "last") else found


def _limit(condition: str, column: str, wanted: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400} if column == "age" else {}
    unit = units.get(wanted[-1:], 1)
    try:
        if column not in ("generations", "best", "last", "age"):
            raise ValueError
        return float(wanted[:-1] if wanted[-1:] in units else wanted) * unit
    except ValueError:
        raise ConfigError(
            f"--filter {condition!r}: > and < are for numbers: generations, best, last, and age (90s, 10m, 2h, 3d), as "
            "in 'best>0.5' or 'age<2h'"
        ) from None


def row_of(path: Path) -> Row:
    """What is known of the run in a directory; whatever is wrong with it is its ``trouble``."""
    row = Row(path.name, started=_changed(path))
    try:
        run = RunDir.open(path)
        view = RunView(run, path.name)
        started = _time(run.environment.get("started_utc")) or row.started
        row = replace(row, kind=view.kind, model=view.model, task=view.task, started=started)
        done = max((line["generation"] for line in view.metrics), default=0)
        scores = view.values("heldout_reward")
        row = replace(row, generations=done, total=view.total, bits=not view.measure.higher)
        if scores:
            row = replace(row, best=max(scores), last=scores[-1])
        return replace(row, state=_state(path, view, done))
    except (EggrollError, OSError) as error:
        return replace(row, trouble=str(error))


def _state(path: Path, view: RunView, done: int) -> str:
    if holder(path) is not None:
        return RUNNING
    if view.total is not None and done >= view.total:
        return FINISHED
    if view.result and not view.result.get("interrupted"):
        return FINISHED if view.total is None else ENDED
    return STOPPED


def _time(text: str | None) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp() if text else None
    except (ValueError, OverflowError, OSError):
        return None


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


@dataclass
class Folder:
    """The runs in a folder, which may change; what has not changed since the last look is not read again."""

    path: Path
    _known: dict[str, tuple[object, Row]] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """One row for each run.

        Raises:
            RunError: there is no such folder, or no run in it.
        """
        found = []
        for path in self._runs():
            seen = _fingerprint(path)
            if path.name not in self._known or self._known[path.name][0] != seen:
                self._known[path.name] = (seen, row_of(path))
            found.append(self._known[path.name][1])
        if not found:
            raise RunError(f"there is no run in {self.path}. {GIVE}")
        return found

    def _runs(self) -> Iterator[Path]:
        try:
            # A model's directory has a config.json, too, but does not say where it was made.
            if _is_run(self.path):
                yield self.path.resolve()
                return
            yield from (path for path in sorted(self.path.iterdir()) if _is_run(path))
        except OSError as error:
            what = "does not exist" if not self.path.exists() else f"cannot be read: {error.strerror}"
            raise RunError(f"{self.path} {what}. {GIVE}") from None


def _is_run(path: Path) -> bool:
    return (path / CONFIG).exists() and (path / ENVIRONMENT).exists()


def _fingerprint(path: Path) -> object:
    """What changes whenever a row does: the files' sizes and times, and whether anyone writes."""
    found: list[object] = [holder(path) is not None]
    for name in (CONFIG, ENVIRONMENT, "metrics.jsonl", "result.json"):
        try:
            facts = (path / name).stat()
            found.append((facts.st_size, facts.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def chosen(
    rows: Sequence[Row], *, sort: str, conditions: Sequence[str] = (), reverse: bool = False, now: float | None = None
) -> list[Row]:
    """The rows that fulfil all conditions, sorted.

    Args:
        rows: of :meth:`Folder.rows`.
        sort: one of :data:`COLUMNS`.
        conditions: each a word that stands in any cell, or ``column=word``, ``column>number``, ``column<number``.
        reverse: the last first.
        now: seconds since 1970, for ages; ``None`` asks the clock.

    Raises:
        ConfigError: a column or a condition that there is not.
    """
    if sort not in COLUMNS:
        raise ConfigError(f"--sort {sort!r} must be one of: {', '.join(COLUMNS)}")
    now = time.time() if now is None else now
    kept = [row for row in rows if all(row.holds(condition, now) for condition in conditions)]
    key: Callable[[Row], tuple[float | str, str]] = lambda row: (row.value(sort), row.name)  # noqa: E731
    return sorted(kept, key=key, reverse=reverse)
