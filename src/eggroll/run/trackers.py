"""Where metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio, or nowhere."""

from __future__ import annotations

import difflib
import importlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from eggroll.errors import ConfigError, MissingExtraError
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
        report_to: ``tensorboard``, ``wandb``, ``trackio``, ``none``; several as a sequence or separated by commas.

    Raises:
        ConfigError: a name is not known.
        MissingExtraError: what a tracker needs is not installed.
    """
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = [name.strip().lower() for name in names if name.strip()]
    for name in names:
        if name not in _KINDS and name != "none":
            allowed = [*_KINDS, "none"]
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"report_to (={name!r}) must be one or several of: {', '.join(allowed)}{hint}")
    wanted = list(dict.fromkeys(name for name in names if name != "none"))
    for name in wanted:
        for module in _NEEDS[name]:
            _imported(module, name)
    return wanted


def make_trackers(report_to: str | Sequence[str], run: RunDir) -> Tracker:
    """One tracker for all that ``report_to`` names.

    Args:
        report_to: as for :func:`tracker_names`.
        run: the run. Call this after :meth:`RunDir.rewind`: events after the run's last generation are then hidden.

    Raises:
        ConfigError: a name is not known.
        MissingExtraError: what a tracker needs is not installed.
    """
    trackers = {}
    for name in tracker_names(report_to):
        try:
            trackers[name] = _KINDS[name](run)
        except Exception as error:  # no login, no network, a directory that cannot be written
            _warn_of(name, error)
    return _Trackers(trackers)


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
                _warn_of(name, error)


def _warn_of(name: str, error: Exception) -> None:
    warnings.warn(
        f"{name} failed ({type(error).__name__}: {error}) and gets no more metrics; the run goes on, and "
        "metrics.jsonl has all of them",
        TrackerWarning,
        stacklevel=5,
    )


def _imported(module: str, name: str) -> ModuleType:
    """A module that a tracker needs; its package may be in no extra of the command, so the package is named."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"--report-to {name} needs {name!r}, which could not be imported ({error}). "
            f"Install it with: pip install {name}; or go without it: --report-to none"
        ) from error


def _tag(key: str) -> str:
    metric = METRICS.get(key)
    return f"{metric.group}/{metric.name}" if metric else key


class _TensorBoard:
    """Events by the tensorboard package alone: torch's writer makes the same ones, but a run in JAX has no torch."""

    def __init__(self, run: RunDir) -> None:
        modules = [_imported(module, "tensorboard") for module in _NEEDS["tensorboard"]]
        writer, self._events, self._summaries, texts = modules
        self._text_of = texts.text_pb
        resumed = run.events.exists()
        self._writer = writer.EventFileWriter(str(run.events))
        if resumed:
            # A resumed run repeats the steps after its last generation; this hides what was logged for them before.
            purge_step = len(run.updates()) + 1
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._add(step=purge_step, file_version="brain.Event:2")
            self._add(step=purge_step, session_log=start)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = self._summaries.Summary.Value
        for tag, value in metrics.items():
            self._add(step=step, summary=self._summaries.Summary(value=[values(tag=tag, simple_value=value)]))
        self._writer.flush()

    def text(self, step: int, tag: str, text: str) -> None:
        # TensorBoard renders Markdown; an indented block shows the text as it is
        block = "\n".join("    " + line for line in text.splitlines())
        self._add(step=step, summary=self._text_of(f"{tag}/text_summary", block))

    def close(self) -> None:
        self._writer.close()

    def _add(self, **fields: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), **fields))


class _WandB:
    def __init__(self, run: RunDir) -> None:
        self._wandb = _imported("wandb", "wandb")
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


class _Trackio:
    """Trackio keeps runs on this machine (``trackio show``), or in a Space that ``TRACKIO_SPACE_ID`` names."""

    def __init__(self, run: RunDir) -> None:
        self._trackio = _imported("trackio", "trackio")
        # Two runs may have folders of the same name; a resumed one goes on in its own.
        short = str(run.environment.get("run_id", ""))[:8]
        self._run = self._trackio.init(
            project="eggroll",
            name=f"{run.path.resolve().name}-{short}" if short else run.path.resolve().name,
            resume="allow",
            config=run.config,
            embed=False,
            auto_log_gpu=False,  # metrics.jsonl has what the run itself takes
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._trackio.Markdown(f"```text\n{text}\n```")}, step=step)

    def close(self) -> None:
        self._run.finish()


_NEEDS = {
    "tensorboard": (
        "tensorboard.summary.writer.event_file_writer",
        "tensorboard.compat.proto.event_pb2",
        "tensorboard.compat.proto.summary_pb2",
        "tensorboard.plugins.text.summary_v2",
    ),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
_KINDS: dict[str, Callable[[RunDir], Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "trackio": _Trackio}
