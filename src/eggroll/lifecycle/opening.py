"""A run's directory, new or resumed, and the options that it was started with."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from eggroll._command import typed
from eggroll.core.config import ESConfig
from eggroll.core.reading import NUMBER, check_fields
from eggroll.core.records import UpdateRecord
from eggroll.core.settings import about, flag_of, from_json_values, may_change, to_json_values
from eggroll.errors import ConfigError, RunError
from eggroll.lifecycle.kind import Plan, RunKind
from eggroll.lifecycle.sources import program_fingerprints
from eggroll.lifecycle.trust import believed, check_resumed, seal
from eggroll.run.files import explained
from eggroll.run.lock import locked
from eggroll.run.metrics import to_json
from eggroll.run.run_dir import CONFIG, RunDir

OLD_FINGERPRINTS = ("data_fingerprint",)
NOT_KEPT = ("resume", "accept_changes")
"""Options that are said anew each time."""


def kind_name(config: Mapping[str, Any]) -> str:
    """The kind of a run from its ``config.json``; empty for a run that no command started."""
    if "kind" in config:
        return str(config["kind"])
    if "recipe" in config:  # runs from before kinds
        return f"recipe {config['recipe']}"
    return "tune" if isinstance(config.get("options"), dict) else ""


def options_of_run(kind: RunKind, path: str | Path) -> Any:
    """The options that a run was started with.

    Raises:
        RunError: it is a run of another kind, has settings that this version does not know, or was changed.
        ConfigError: settings that cannot work.
    """
    run = RunDir.open(path)
    run.check_unchanged()
    config = run.config
    found = kind_name(config)
    if found != kind.name:
        what = f"of eggroll {found}" if found else "that no command started"
        raise RunError(f"{path} is a run {what}, so eggroll {kind.name} cannot continue it")
    stored = config.get("options")
    if not isinstance(stored, dict):  # runs from before kinds kept them at the top
        stored = {key: value for key, value in config.items() if key not in ("kind", *OLD_FINGERPRINTS)}
    return from_json_values(kind.options, stored, ignored=kind.retired, source=f"{path}/config.json")


def resumed_options(kind: RunKind, path: str | Path) -> Any:
    """The options that a run goes on with if nothing else is said: its own, but code only if it was asked for here."""
    options = believed(options_of_run(kind, path), RunDir.open(path))
    return dataclasses.replace(options, resume=str(path), accept_changes=False)


def check_code(kind: RunKind, options: Any) -> None:
    """Refuse to resume a run without the code that it ran, before anything is loaded.

    Raises:
        RunError: the options do not ask for code that the run had.
    """
    if options.resume is not None:
        before = options_of_run(kind, options.resume)
        check_resumed(before, options, RunDir.open(options.resume), f"{typed()} {kind.name}")


def check_not_taken(options: Any) -> None:
    """Refuse a new run's directory that holds a run already, or has no name in text, before anything is loaded."""
    for path in (options.output, options.resume):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"the name {path!a} cannot be read as text here, so no model can be written there. If it is right, "
                "set PYTHONUTF8=1, or a locale such as C.UTF-8; otherwise choose another directory"
            ) from None
    if options.resume is None and options.output is not None and (Path(options.output) / "config.json").exists():
        RunDir.create(options.output, {})  # raises


def open_run(kind: RunKind, plan: Plan, held: ExitStack) -> RunDir:
    """A new run directory, or the one to resume after a check of its settings.

    Args:
        kind: what is trained.
        plan: the run.
        held: gets the lock of a new run; that of a run to resume is held already.

    Raises:
        RunError: the directory holds a run; or the run was started with other settings or data, or was changed.
        ConfigError: the run has more generations than it shall have.
    """
    options = plan.options
    stored = {key: value for key, value in to_json_values(options, kind.options).items() if key not in NOT_KEPT}
    fingerprints = {**plan.fingerprints, **program_fingerprints(options)}
    settings: dict[str, Any] = {"kind": kind.name, "options": stored, **fingerprints}
    values = plan.config.to_dict().items()
    algorithm = {key: value for key, value in values if key not in stored or stored[key] != value}
    if algorithm:  # what is derived from the options
        settings["config"] = algorithm
    if options.resume is None:
        path = options.output or f"runs/{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with explained(Path(path)):
            Path(path).mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(path, command_line()))
        return RunDir.create(path, settings, command=command_line(), extra={**plan.facts, **seal(options)})
    run = RunDir.open(options.resume)
    finished = len(run.updates())
    if plan.config.generations < finished:
        raise ConfigError(
            f"--generations {plan.config.generations}: the run in {run.path} has {finished} finished generations "
            f"already; give more, or rebuild an earlier one: {typed()} replay {shlex.quote(str(run.path))} "
            f"--to {plan.config.generations}"
        )
    _check_options(kind, run, options)
    _check_copies(run, plan.config, algorithm)
    _check_logs(kind, run, plan.config)
    # Before the first generation nothing depends on them: a reward that failed there has been mended.
    accepted = _changes(run, fingerprints)
    if accepted and finished and not options.accept_changes:
        raise RunError(
            f"what the run in {run.path} reads has changed since it began:\n"
            + "\n".join(f"  - {change}" for change in accepted)
            + "\nPut it back as it was, or start a new run in another directory (-o). To go on all the same, add "
            "--accept-changes; environment.json will say what had changed"
        )
    if accepted:
        warnings.warn(f"accepted, and noted in {run.path}/environment.json: {'; '.join(accepted)}", stacklevel=2)
    run.update_config(settings)
    run.note_resume(finished, command_line(), extra=seal(options), accepted=accepted)
    return run


def command_line() -> list[str]:
    """The command as it was typed."""
    return ["eggroll", *map(shlex.quote, sys.argv[1:])]


def _changes(run: RunDir, fingerprints: Mapping[str, str]) -> list[str]:
    """What a run reads and does not find as it was, one line each. Older runs do not know how it was."""
    return [
        f"{name.replace('_', ' ')}: {run.config[name]} in the run, {value} now"
        for name, value in fingerprints.items()
        if name in run.config and run.config[name] != value
    ]


def _check_copies(run: RunDir, config: ESConfig, derived: Mapping[str, Any]) -> None:
    """Compare the algorithm's settings with those that its newest checkpoint and the run's first start have kept.

    Raises:
        RunError: they differ, so that ``config.json`` was changed.
    """
    free, now = may_change(config), json.loads(to_json(config.to_dict()))
    newest = run.latest_checkpoint()
    copies = {
        CONFIG: (run.config.get("config"), json.loads(to_json(derived))),
        "its newest checkpoint": (newest.manifest.get("config") if newest is not None else None, now),
    }
    for where, (copy, ours) in copies.items():
        if not isinstance(copy, dict):
            continue
        changes = [
            f"  - {name}: {_shown(copy[name])} there, {_shown(value)} now"
            for name, value in ours.items()
            if name in copy and name not in free and copy[name] != value
        ]
        if changes:
            raise RunError(
                f"the settings of the run in {run.path} are not those that {where} was written with:\n"
                + "\n".join(changes)
                + "\nIts config.json was changed, and the run would go on as another one: undo the change"
            )


def _check_logs(kind: RunKind, run: RunDir, config: ESConfig) -> None:
    """Look through the logs before anything is loaded from them.

    Raises:
        RunError: a generation's line lacks a number that the rest of the run needs, or a record has another number of
            weights than the run has members (or pairs).
    """
    needed = {**dict.fromkeys(("evaluate_s", "update_s", "elapsed_s"), NUMBER), **kind.measured}
    for line in run.metrics():
        if "event" not in line:
            try:
                check_fields(line, needed)
            except ValueError as error:
                raise RunError(
                    f"{run.path}/metrics.jsonl, generation {line['generation']}: {error}; it was changed after the run "
                    "wrote it: restore it"
                ) from None
    check_sizes(run, run.updates(), config.population_size)


def check_sizes(run: RunDir, records: Sequence[UpdateRecord], members: int) -> None:
    """Refuse records whose number of scores is not that of the run's members.

    Raises:
        RunError: one has another number of weights than there are members, or pairs.
    """
    for record in records:
        if len(record.shaped_fitness) not in (members, members // 2):
            raise RunError(
                f"{run.path}/updates.jsonl, generation {record.generation}: it has {len(record.shaped_fitness)} "
                f"weights, and the run {members} members; the log or config.json was changed: restore it"
            )


def _check_options(kind: RunKind, run: RunDir, options: Any) -> None:
    """Refuse to go on with other options than the run was started with, apart from those that change no result."""
    before, free = options_of_run(kind, run.path), may_change(options)
    names = to_json_values(options, kind.options)
    changes = [
        f"  - {_word(kind, name)}: {_shown(getattr(before, name))} in the run, {_shown(value)} now"
        for name, value in names.items()
        if name not in free and getattr(before, name) != getattr(options, name)
    ]
    if changes:
        allowed = ", ".join(_word(kind, name) for name in names if name in free and name not in NOT_KEPT)
        raise RunError(
            f"the run in {run.path} was started with other settings:\n"
            + "\n".join(changes)
            + "\nLeave them out, as --resume takes them from the run, or start a new run in another directory (-o). "
            f"Only {allowed} may change."
        )
    if (before.workers is None) != (options.workers is None):
        # Members are computed in ranges there, in larger batches here, and round differently.
        was = "without --workers" if before.workers is None else f"with --workers {before.workers}"
        raise ConfigError(
            f"the run in {run.path} was started {was}. Their number may change on the way, but not whether there are "
            "any: results would differ in the last bits"
        )


def _word(kind: RunKind, name: str) -> str:
    return str(about(kind.options, name).get("positional") or flag_of(name))


def _shown(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
