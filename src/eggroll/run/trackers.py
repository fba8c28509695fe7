"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, or nowhere."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from eggroll._optional import require
from eggroll.errors import ConfigError
from eggroll.run.metrics import METRICS

if TYPE_CHECKING:
    from eggroll.run.run_dir import RunDir


class TrackerWarning(UserWarning):
    """A tracker failed and is no longer used; the run goes on."""


class Tracker(Protocol):
    """Takes numbers and texts of a run. ``step`` is the number of finished generations."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the numbers of one line of ``metrics.jsonl``; other values are left out."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Take a text, for example a sample."""

    def close(self) -> None:
        """Write what is still held back. Nothing can be logged afterwards."""


def tracker_names(report_to: str | Sequence[str]) -> list[str]:
    """The trackers that ``report_to`` names, each once; to be asked before a run is made that would be left behind.

    Args:
        report_to: ``tensorboard``, ``wandb``, ``none``; several as a sequence or separated by commas.

    Raises:
        ConfigError: a name is not known.
    """
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = [name.strip().lower() for name in names if name.strip()]
    for name in names:
        if name not in _KINDS and name != "none":
            allowed = [*_KINDS, "none"]
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"report_to (={name!r}) must be one or several of: {', '.join(allowed)}{hint}")
    return list(dict.fromkeys(name for name in names if name != "none"))


def make_trackers(report_to: str | Sequence[str], run: RunDir) -> Tracker:
    """One tracker for all that ``report_to`` names.

    Args:
        report_to: as for :func:`tracker_names`.
        run: the run. Call this after :meth:`RunDir.rewind`: events after the run's last generation are then hidden.

    Raises:
        ConfigError: a name is not known.
        MissingExtraError: what a tracker needs is not installed.
    """
    return _Trackers({name: _KINDS[name](run) for name in tracker_names(report_to)})


class TrackerListener:
    """Hands the metrics of each generation of a loop to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def generation(self, metrics: Mapping[str, Any]) -> None:
        """Log one generation."""
        self.tracker.log(int(metrics["generation"]), metrics)


class _Trackers:
    """Several trackers as one. One that fails is dropped with a warning: it must never end a run."""

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {
            _tag(key): float(value)
            for key, value in metrics.items()
            if key != "generation" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._each(lambda tracker: tracker.log(step, numbers))

    def text(self, step: int, tag: str, text: str) -> None:
        self._each(lambda tracker: tracker.text(step, tag, text))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[name]
                warnings.warn(
                    f"{name} failed ({type(error).__name__}: {error}) and gets no more metrics; the run goes on, and "
                    "metrics.jsonl has all of them",
                    TrackerWarning,
                    stacklevel=4,
                )


def _tag(key: str) -> str:
    metric = METRICS.get(key)
    return f"{metric.group}/{metric.name}" if metric else key


class _TensorBoard:
    def __init__(self, run: RunDir) -> None:
        tensorboard = require("torch.utils.tensorboard", extra="llm")
        # a resumed run repeats the steps after its last generation; the purge hides what was logged for them before
        purge_step = len(run.updates()) + 1 if run.events.exists() else None
        self._writer = tensorboard.SummaryWriter(str(run.events), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        # TensorBoard renders Markdown; an indented block shows the text as it is
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run: RunDir) -> None:
        self._wandb = require("wandb", extra="wandb")
        self._run = self._wandb.init(
            project="eggroll",
            name=run.path.resolve().name,
            id=run.environment.get("run_id"),
            resume="allow",
            dir=str(run.path),
            config=run.config,
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        table = self._wandb.Table(columns=["generation", "text"], data=[[step, text]])
        self._run.log({tag: table}, step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, Callable[[RunDir], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
