"""A run's directory, new or resumed, and the options that it was started with."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eggroll._command import typed
from eggroll.core.settings import about, flag_of, from_json_values, may_change, to_json_values
from eggroll.errors import ConfigError, RunError
from eggroll.lifecycle.kind import Plan, RunKind
from eggroll.lifecycle.trust import believed, check_resumed, seal
from eggroll.run.run_dir import RunDir

OLD_FINGERPRINTS = ("data_fingerprint",)


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
        RunError: it is a run of another kind, or has settings that this version does not know.
        ConfigError: settings that cannot work.
    """
    config = RunDir.open(path).config
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
    return dataclasses.replace(believed(options_of_run(kind, path), RunDir.open(path)), resume=str(path))


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


def open_run(kind: RunKind, plan: Plan) -> RunDir:
    """A new run directory, or the one to resume after a check of its settings.

    Raises:
        RunError: the directory holds a run; or the run was started with other settings or data.
        ConfigError: the run has more generations than it shall have.
    """
    options = plan.options
    stored = {key: value for key, value in to_json_values(options, kind.options).items() if key != "resume"}
    settings: dict[str, Any] = {"kind": kind.name, "options": stored, **plan.fingerprints}
    values = plan.config.to_dict().items()
    algorithm = {key: value for key, value in values if key not in stored or stored[key] != value}
    if algorithm:  # what is derived from the options
        settings["config"] = algorithm
    if options.resume is None:
        path = options.output or f"runs/{plan.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        return RunDir.create(path, settings, command=command_line(), extra={**plan.facts, **seal(options)})
    run = RunDir.open(options.resume)
    finished = len(run.updates())
    if plan.config.generations < finished:
        raise ConfigError(
            f"--generations {plan.config.generations}: the run in {run.path} has {finished} finished generations "
            f"already; give more, or rebuild an earlier one: {typed()} replay {shlex.quote(str(run.path))} "
            f"--to {plan.config.generations}"
        )
    _check_options(kind, run, options, plan.fingerprints)
    run.update_config(settings)
    run.note_resume(finished, command_line(), extra=seal(options))
    return run


def command_line() -> list[str]:
    """The command as it was typed."""
    return ["eggroll", *map(shlex.quote, sys.argv[1:])]


def _check_options(kind: RunKind, run: RunDir, options: Any, fingerprints: Mapping[str, str]) -> None:
    """Refuse to go on with other options than the run was started with, apart from those that change no result."""
    before, free = options_of_run(kind, run.path), may_change(options)
    names = to_json_values(options, kind.options)
    changes = [
        f"  - {_word(kind, name)}: {_shown(getattr(before, name))} in the run, {_shown(value)} now"
        for name, value in names.items()
        if name not in free and getattr(before, name) != getattr(options, name)
    ]
    changes += [
        f"  - {name.replace('_', ' ')}: {run.config[name]} in the run, {value} now"
        for name, value in fingerprints.items()
        if name in run.config and run.config[name] != value
    ]
    if changes:
        allowed = ", ".join(_word(kind, name) for name in names if name in free and name != "resume")
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
