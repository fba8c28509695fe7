"""The directory of a run: its config, environment, logs and checkpoints.

    config.json         resolved settings                  environment.json   versions, hardware, command
    updates.jsonl       one record per finished update     metrics.jsonl      one line per generation
    samples.jsonl       prompts, completions, rewards      checkpoints/       see eggroll.run.checkpoint
    tensorboard/        TensorBoard's events               report.html        see eggroll.run.report
    .lock               see eggroll.run.lock

``generation`` in ``updates.jsonl`` counts from 0, as in the address of its noise; in ``metrics.jsonl``,
``samples.jsonl`` and checkpoints it is the number of finished updates: record 0 makes generation 1, and generation 0 is
the model as it came. Once its record is on disk, a generation is finished, and :meth:`RunDir.rewind` drops what one
that was killed before has left. Metrics and samples appended before the record are there for every finished one.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from eggroll.core.reading import OBJECT, OBJECTS, TEXT, TEXTS, WHOLE, Kind, check_fields, parse
from eggroll.core.records import UpdateRecord, read_log, with_check
from eggroll.errors import CheckpointError, RunError, RunWriteError
from eggroll.run import checkpoint, provenance
from eggroll.run.checkpoint import Checkpoint
from eggroll.run.files import (
    check_plain,
    check_tree,
    explained,
    fsync_directory,
    read_plain,
    remove_temporaries,
    write_atomic,
)
from eggroll.run.metrics import MEASURED, JsonLines, to_json

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
CHECK = "check"
"""The entry of config.json that is the checksum of the others."""
SETTINGS = {"kind": TEXT, "recipe": TEXT, "options": OBJECT, "config": OBJECT, CHECK: TEXT}
ABOUT = {
    "run_id": TEXT, "started_utc": TEXT, "command": TEXTS, "packages": OBJECT, "noise_version": WHOLE, "gpus": TEXTS,
    "resumed": OBJECTS,
}  # fmt: skip
"""Of what kind the entries of config.json and environment.json are that are read again."""
FILES = (
    *(CONFIG, ENVIRONMENT, "updates.jsonl", "metrics.jsonl", "samples.jsonl"),
    *("result.json", "report.html", "curve.png", "episode.gif", "episode.html"),
)
FOLDERS = ("checkpoints", "tensorboard", "wandb")
MODEL = "model"
"""The folder of a run that holds its result, if that is a model of several files."""


class RunDir:
    """A run on disk. Make one with :meth:`create` or :meth:`open`.

    Every writing method raises :class:`RunWriteError` if the disk is full or the directory cannot be written; what was
    there before is then intact.
    """

    def __init__(self, path: Path, config: dict[str, Any], environment: dict[str, Any]) -> None:
        self.path = path
        self.config = config
        self._config_changed = False
        self.environment = environment
        self.checkpoints = path / "checkpoints"
        self.events = path / "tensorboard"
        self._updates = JsonLines(path / "updates.jsonl", {"generation": WHOLE})
        self._metrics = JsonLines(path / "metrics.jsonl", {"generation": WHOLE}, MEASURED)
        self._samples = JsonLines(path / "samples.jsonl", {"generation": WHOLE})
        self._checks: list[str] | None = None  # of the records in updates.jsonl, read at the first append

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
            RunError: the directory holds a run, or a link where a file of a run belongs.
            RunWriteError: it cannot be made or written.
        """
        path = Path(path)
        _check_links(path)
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
        write_atomic(path / CONFIG, _sealed(run.config))  # last: a directory with a config holds a run
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The run in the directory ``path``. Nothing is changed by opening, so a run that goes on can be read.

        Raises:
            RunError: there is no run, or its config cannot be read; or a link, or a special file, is where a file of
                it belongs.
        """
        path = Path(path)
        _check_links(path)
        if not (path / CONFIG).exists():
            what = "does not exist" if not path.exists() else f"holds no run (no {CONFIG})"
            raise RunError(f"{path} {what}.{_runs_near(path)}")
        environment = _read_json(path / ENVIRONMENT, ABOUT) if (path / ENVIRONMENT).exists() else {}
        config = _read_json(path / CONFIG, SETTINGS)
        check = config.pop(CHECK, None)
        run = cls(path, config, environment)
        run._config_changed = check is not None and check != checkpoint.checksum(config)
        return run

    def check_unchanged(self) -> None:
        """Refuse settings that are not those which the run wrote. Older runs have no checksum of them.

        Raises:
            RunError: ``config.json`` was changed.
        """
        if self._config_changed:
            raise RunError(
                f"{self.path / CONFIG} was changed after the run wrote it: its checksum is another one, and the run "
                f'would go on as another one. Undo the change; or, if it is meant, remove its entry "{CHECK}"'
            )

    @property
    def run_id(self) -> str:
        """What tells this run from others, whatever its directory is called; empty if it is not known."""
        return str(self.environment.get("run_id", ""))

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
        write_atomic(self.path / CONFIG, _sealed(new))
        self.config = new

    def note_resume(
        self,
        generation: int,
        command: list[str] | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        accepted: Sequence[str] = (),
    ) -> None:
        """Add to ``environment.json`` that the run goes on from ``generation``, here and now, with these versions.

        ``extra`` are entries that take the place of the run's own; ``accepted`` is what has changed since it began.
        """
        entry = {"generation": generation, **provenance.environment(command)}
        if accepted:
            entry["accepted_changes"] = list(accepted)
        new = {**self.environment, **(extra or {}), "resumed": [*self.environment.get("resumed", []), entry]}
        new = json.loads(to_json(new))
        write_atomic(self.path / ENVIRONMENT, _pretty(new))
        self.environment = new

    def append_update(self, record: UpdateRecord) -> None:
        """Append the record of the next generation; with it on disk, that generation is finished.

        Raises:
            RunError: the record is not of the next generation, or another process writes to this run.
        """
        if self._checks is None:
            self._checks = [check for _, check in self._logged()]
        finished = len(self._checks)
        if record.generation != finished:
            raise RunError(
                f"{self._updates.path} holds {finished} generations, so the next record must be of generation "
                f"{finished}, not {record.generation}; call rewind({record.generation}) to drop later ones"
            )
        line, check = with_check(record.to_json(), self._checks[-1] if self._checks else "")
        try:
            self._updates.append(line)
        except BaseException:
            self._checks = None
            raise
        self._checks.append(check)

    def updates(self, stop: int | None = None) -> list[UpdateRecord]:
        """The records of generations 0 to ``stop`` (exclusive), or all; a torn last line is left out.

        Raises:
            RunError: the log was changed or is damaged, or generations are missing.
        """
        return [record for record, _ in self._logged() if stop is None or record.generation < stop]

    def _logged(self) -> list[tuple[UpdateRecord, str]]:
        """The records, each with its checksum."""
        path = self._updates.path
        try:
            return list(read_log(read_plain(path), path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error

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
        self._checks = None

    def save_checkpoint(
        self,
        generation: int,
        tensors: Mapping[str, torch.Tensor],
        manifest: Mapping[str, Any],
        *,
        keep: int = 2,
        also: Collection[int] = (),
    ) -> Path:
        """Save the state after ``generation`` updates, atomically, and remove all but the newest ``keep`` checkpoints.

        Args:
            generation: finished updates.
            tensors: any dtype and device; they are saved bit for bit.
            manifest: everything else, as JSON values.
            keep: checkpoints to keep, this one included.
            also: generations whose checkpoints are kept besides these, such as the best one.

        Returns:
            The checkpoint's directory.
        """
        checks = self._checks if self._checks is not None else [check for _, check in self._logged()]
        log = checks[generation - 1] if 0 < generation <= len(checks) else None
        return checkpoint.save(
            self.checkpoints, generation, tensors, manifest, run_id=self.run_id, keep=keep, log=log, also=also
        )

    def checkpoint_of(self, generation: int) -> Checkpoint:
        """The checkpoint of ``generation``, without its tensors.

        Raises:
            CheckpointError: there is none, or it is damaged, or of another run.
        """
        return checkpoint.read(self.checkpoints / checkpoint._name(generation), run_id=self.run_id)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint that is whole, or ``None`` if there never was one. Damaged ones are skipped: a warning.

        Raises:
            CheckpointError: there are checkpoints, but none can be used; or the log is not the one that the newest was
                made of.
        """
        found = checkpoint.latest(self.checkpoints, run_id=self.run_id)
        if found is not None and found.log is not None:
            checks = [check for _, check in self._logged()]
            if found.generation <= len(checks) and checks[found.generation - 1] != found.log:
                raise CheckpointError(
                    f"{self._updates.path} is not the log that {found.path} was made of: its first {found.generation} "
                    "records are those of another run, or were changed. Restore the log from a copy, or start the run "
                    "again"
                )
        return found

    def has_checkpoint(self, generation: int) -> bool:
        """Whether a checkpoint of ``generation`` is there, of this run and not truncated; its tensors are not read."""
        return checkpoint.exists(self.checkpoints, generation, run_id=self.run_id)

    def folder(self, name: str) -> Path:
        """The path of a folder of the run that a result is written into; it need not be there.

        Raises:
            RunError: it is a link, or holds one: what is written would go elsewhere.
        """
        check_tree(self.path / name)
        return self.path / name

    def write_file(self, name: str, data: bytes) -> Path:
        """Write a file of the run atomically, for example its report. Returns its path."""
        if Path(name).name != name or name in (CONFIG, ENVIRONMENT):
            raise RunWriteError(f"{name!r} is not the name of a file that can be written into {self.path}")
        check_plain(self.path / name)
        write_atomic(self.path / name, data)
        return self.path / name


def _check_links(path: Path) -> None:
    """Refuse links and special files in the places of what a run consists of.

    The run's directory itself may be reached by a link: whoever typed its name has followed it.
    """
    for name in FILES:
        check_plain(path / name)
    for name in FOLDERS:
        check_plain(path / name, directory=True)
    check_tree(path / MODEL)


def _line(values: Mapping[str, Any]) -> str:
    generation = values.get("generation")
    if isinstance(generation, bool) or not isinstance(generation, int):
        raise RunError(f"a line of a log needs 'generation', the number of finished updates; got {dict(values)!r}")
    return to_json(values)


def _pretty(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _sealed(config: Mapping[str, Any]) -> bytes:
    return _pretty({**config, CHECK: checkpoint.checksum(config)})


def _read_json(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    try:
        values = parse(read_plain(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # RecursionError: nested thousands of levels deep
        raise RunError(f"{path} is not JSON ({error}); it was changed after the run wrote it: restore it") from error
    if not isinstance(values, dict):
        raise RunError(f"{path} must hold a JSON object, not {type(values).__name__}; restore it")
    try:
        return check_fields(values, optional=kinds)
    except ValueError as error:
        raise RunError(f"{path}: {error}; it was changed after the run wrote it: restore it") from None


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
