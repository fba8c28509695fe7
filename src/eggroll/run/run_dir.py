"""The directory of a run: its config, environment, logs and checkpoints.

    config.json         resolved settings                  environment.json   versions, hardware, command
    updates.jsonl       one record per finished update     metrics.jsonl      one line per generation
    samples.jsonl       prompts, completions, rewards      checkpoints/       see eggroll.run.checkpoint
    tensorboard/        TensorBoard's events               report.html        see eggroll.run.report

``generation`` in ``updates.jsonl`` counts from 0, as in the address of its noise; in ``metrics.jsonl``,
``samples.jsonl`` and checkpoints it is the number of finished updates: record 0 makes generation 1, and generation 0 is
the model as it came. Once its record is on disk, a generation is finished, and :meth:`RunDir.rewind` drops what one
that was killed before has left. Metrics and samples appended before the record are there for every finished one.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from eggroll.core.records import UpdateRecord, read_records
from eggroll.errors import RunError, RunWriteError
from eggroll.run import checkpoint, provenance
from eggroll.run.checkpoint import Checkpoint
from eggroll.run.files import explained, fsync_directory, remove_temporaries, write_atomic
from eggroll.run.metrics import JsonLines, to_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
ENVIRONMENT = "environment.json"


class RunDir:
    """A run on disk. Make one with :meth:`create` or :meth:`open`.

    Every writing method raises :class:`RunWriteError` if the disk is full or the directory cannot be written; what was
    there before is then intact.
    """

    def __init__(self, path: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self.environment = environment
        self.checkpoints = path / "checkpoints"
        self.events = path / "tensorboard"
        self._updates = JsonLines(path / "updates.jsonl")
        self._metrics = JsonLines(path / "metrics.jsonl")
        self._samples = JsonLines(path / "samples.jsonl")
        self._finished: int | None = None  # records in updates.jsonl, counted at the first append

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        command: list[str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start a run in the directory ``path``, which is made if need be.

        Args:
            path: the directory; it may exist, but must not hold a run.
            config: the resolved settings.
            command: the command line; ``None`` takes that of this process.
            extra: more entries for ``environment.json``, for example what the model is.

        Raises:
            RunError: the directory holds a run.
            RunWriteError: it cannot be made or written.
        """
        path = Path(path)
        run = cls(path, json.loads(to_json(config)), {})
        held = [file.name for file in (path / CONFIG, run._updates.path, run._metrics.path) if file.exists()]
        if held or checkpoint.found(run.checkpoints):
            raise RunError(
                f"{path} already holds a run ({held[0] if held else 'checkpoints'} is there). "
                "Continue it with --resume, or choose another directory with -o"
            )
        with explained(path):
            path.mkdir(parents=True, exist_ok=True)
            fsync_directory(path.parent)
            remove_temporaries(path)
        facts = {"run_id": secrets.token_hex(8), **provenance.environment(command), **(extra or {})}
        run.environment = json.loads(to_json(facts))
        write_atomic(path / ENVIRONMENT, _pretty(run.environment))
        write_atomic(path / CONFIG, _pretty(run.config))  # last: a directory with a config holds a run
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in the directory ``path``. Nothing is changed by opening, so a run that goes on can be read.

        Raises:
            RunError: there is no run, or its config cannot be read.
        """
        path = Path(path)
        if not (path / CONFIG).exists():
            what = "does not exist" if not path.exists() else f"holds no run (no {CONFIG})"
            raise RunError(f"{path} {what}.{_runs_near(path)}")
        environment = _read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).exists() else {}
        return cls(path, _read_json(path / CONFIG), environment)

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the run, wherever in its config it is: at the top, among the options or the algorithm's."""
        for values in (self.config, self.config.get("options"), self.config.get("config")):
            if isinstance(values, dict) and name in values:
                return values[name]
        return default

    def check_config(self, config: Mapping[str, Any], *, may_change: Collection[str] = ()) -> None:
        """Compare ``config`` with the run's own, apart from the keys in ``may_change``.

        Raises:
            RunError: settings differ; the message lists each with its old and its new value.
        """
        new = json.loads(to_json(config))
        missing = "(not set)"
        changes = [
            f"  - {key}: {_show(self.config, key, missing)} in the run, {_show(new, key, missing)} now"
            for key in [*self.config, *(key for key in new if key not in self.config)]
            if key not in may_change and (key not in new or key not in self.config or new[key] != self.config[key])
        ]
        if changes:
            allowed = f" Only {', '.join(sorted(may_change))} may change." if may_change else ""
            raise RunError(
                f"the run in {self.path} was started with other settings:\n"
                + "\n".join(changes)
                + f"\nResume it with the settings it has, or start a new run in another directory (-o).{allowed}"
            )

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Replace ``config.json`` (atomic), for settings that may change when a run goes on, such as its length."""
        new = json.loads(to_json(config))
        write_atomic(self.path / CONFIG, _pretty(new))
        self.config = new

    def note_resume(
        self, generation: int, command: list[str] | None = None, *, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Add to ``environment.json`` that the run goes on from ``generation``, here and now, with these versions.

        ``extra`` are entries that take the place of the run's own.
        """
        entry = {"generation": generation, **provenance.environment(command)}
        new = {**self.environment, **(extra or {}), "resumed": [*self.environment.get("resumed", []), entry]}
        new = json.loads(to_json(new))
        write_atomic(self.path / ENVIRONMENT, _pretty(new))
        self.environment = new

    def append_update(self, record: UpdateRecord) -> None:
        """Append the record of the next generation; with it on disk, that generation is finished.

        Raises:
            RunError: the record is not of the next generation, or another process writes to this run.
        """
        if self._finished is None:
            self._finished = len(self.updates())
        if record.generation != self._finished:
            raise RunError(
                f"{self._updates.path} holds {self._finished} generations, so the next record must be of generation "
                f"{self._finished}, not {record.generation}; call rewind({record.generation}) to drop later ones"
            )
        try:
            self._updates.append(record.to_json())
        except BaseException:
            self._finished = None
            raise
        self._finished += 1

    def updates(self, stop: int | None = None) -> list[UpdateRecord]:
        """The records of generations 0 to ``stop`` (exclusive), or all; a torn last line is left out.

        Raises:
            RunError: the log is damaged in the middle, or generations are missing.
        """
        if not self._updates.path.exists():
            return []
        records = read_records(self._updates.path)
        return [record for record in records if stop is None or record.generation < stop]

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; it needs a whole number ``generation``. NaN is written as ``null``."""
        self._metrics.append(_line(metrics))

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; a torn last line is left out."""
        return self._metrics.read()

    def append_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append ``samples`` (all or none), each with a whole number ``generation``, to ``samples.jsonl``."""
        self._samples.append(*(_line(sample) for sample in samples))

    def samples(self) -> list[dict[str, Any]]:
        """All lines of ``samples.jsonl``; a torn last line is left out."""
        return self._samples.read()

    def rewind(self, generation: int) -> None:
        """Bring the logs back to where ``generation`` updates are finished, so that the run can go on from there.

        Drops the update records of generations ``>= generation``, and metrics and samples that came later than the
        metrics of ``generation`` finished updates; with 0 everything goes. Checkpoints after ``generation`` are
        removed. Each file is replaced atomically, and rewinding again after a crash in the middle ends the same.

        Raises:
            RunError: fewer than ``generation`` updates are in the log.
        """
        finished = len(self.updates())
        if not 0 <= generation <= finished:
            raise RunError(
                f"cannot go back to generation {generation} of {self.path}: its log holds {finished} finished "
                f"generations; choose 0 to {finished}"
            )
        with explained(self.path):
            checkpoint.remove_after(self.checkpoints, generation)
            remove_temporaries(self.path)
        for log in (self._metrics, self._samples):
            log.keep(lambda values: 0 < generation >= values.get("generation", 0))
        self._updates.keep(lambda values: values["generation"] < generation)
        self._finished = None

    def save_checkpoint(
        self, generation: int, tensors: Mapping[str, torch.Tensor], manifest: Mapping[str, Any], *, keep: int = 2
    ) -> Path:
        """Save the state after ``generation`` updates, atomically, and remove all but the newest ``keep`` checkpoints.

        Args:
            generation: finished updates.
            tensors: any dtype and device; they are saved bit for bit.
            manifest: everything else, as JSON values.
            keep: checkpoints to keep, this one included.

        Returns:
            The checkpoint's directory.
        """
        run_id = str(self.environment.get("run_id", ""))
        return checkpoint.save(self.checkpoints, generation, tensors, manifest, run_id=run_id, keep=keep)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or ``None`` if there never was one. Damaged ones are skipped: a warning.

        Raises:
            CheckpointError: there are checkpoints, but none can be used.
        """
        return checkpoint.latest(self.checkpoints, run_id=str(self.environment.get("run_id", "")))

    def has_checkpoint(self, generation: int) -> bool:
        """Whether a checkpoint of ``generation`` is there, of this run and not truncated; its tensors are not read."""
        return checkpoint.exists(self.checkpoints, generation, run_id=str(self.environment.get("run_id", "")))

    def write_file(self, name: str, data: bytes) -> Path:
        """Write a file of the run atomically, for example its report. Returns its path."""
        if Path(name).name != name or name in (CONFIG, ENVIRONMENT):
            raise RunWriteError(f"{name!r} is not the name of a file that can be written into {self.path}")
        write_atomic(self.path / name, data)
        return self.path / name


def _line(values: Mapping[str, Any]) -> str:
    generation = values.get("generation")
    if isinstance(generation, bool) or not isinstance(generation, int):
        raise RunError(f"a line of a log needs 'generation', the number of finished updates; got {dict(values)!r}")
    return to_json(values)


def _pretty(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        raise RunError(f"{path} is not JSON ({error}); it was changed after the run wrote it: restore it") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} must hold a JSON object, not {type(values).__name__}; restore it")
    return values


def _show(values: Mapping[str, Any], key: str, missing: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else missing


def _runs_near(path: Path) -> str:
    """The runs beside a path that is none, else those in ``runs/``, where commands put theirs."""
    for parent in (path if path.is_dir() else path.parent, Path("runs")):
        try:
            # A model's directory has a config.json, too, but does not say where it was made.
            runs = sorted(e.name for e in parent.iterdir() if (e / CONFIG).exists() and (e / ENVIRONMENT).exists())
        except OSError:
            continue
        if runs:
            return f" Runs in {parent}: {', '.join(runs[:10])}"
    return " Give the directory that a run was told to be in (-o), or that it named at its start (runs/...)"
