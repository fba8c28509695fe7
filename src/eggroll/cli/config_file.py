"""``--config FILE``: settings of a command from YAML or JSON, or from a run's ``config.json``; flags count more."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eggroll._optional import require
from eggroll.cli.parse import CONFIG, parse
from eggroll.cli.watch import option_given
from eggroll.core import reading
from eggroll.core.settings import about, flag_of, wrong_types
from eggroll.errors import ConfigError, EggrollError

COMMANDS = ("tune", "eval", "info", "rl", "pretrain")
"""Commands that take one; each recipe does too."""
ONLY_TYPED = ("resume", "accept_changes")
"""Settings that are about one call of a command, not about a run."""
ALSO_TUNE = ("info", "eval")
"""Commands that take from the ``config.json`` of a run of ``eggroll tune`` what they know."""


def parse_with_file(
    kind: type[Any],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    default_options: Callable[[Sequence[str]], Any] | None = None,
) -> Any:
    """The options that a command line gives; what it does not say comes from the file that ``--config`` names.

    Args:
        kind: the options' dataclass.
        arguments: the command line behind the command's name.
        prog: the command as it is typed, such as ``eggroll tune``.
        description: for ``--help``.
        default_options: the defaults that depend on what was given, on the command line or in the file.

    Raises:
        SystemExit: --help was asked for, or the command line is wrong, which has been said then.
        ConfigError: the file cannot be read, has settings that there are not, or values that cannot work.
    """
    path = option_given(arguments, f"--{CONFIG}")
    values, code = read_settings(path, kind, prog) if path else ({}, {})
    if path and option_given(arguments, "--resume") is not None:
        raise ConfigError(
            f"--resume takes the settings from the run, and --config {path} has some too; leave one of the two out. "
            "What may change on the way, such as --generations, is given as flags"
        )
    default = None
    if default_options is not None:  # as if the file's settings were typed; the first of two counts there
        default = default_options([*arguments, *_typed(values)])
    options = parse(
        kind, arguments, prog=prog, description=description, default=default, given=values, config=path or None
    )
    lacking = {name: value for name, value in code.items() if getattr(options, name) == _default(kind, name)}
    if lacking:
        words = " and ".join(_flag(name, value) for name, value in lacking.items())
        raise ConfigError(
            f"the run of {path} used {words}, which runs code or acts in your name, and a run's directory is not "
            f"trusted with that: it may come from someone else. If you trust it, add to the command: "
            f"{' '.join(_flag(name, value) for name, value in lacking.items())}"
        )
    return options


def read_settings(path: str, kind: type[Any], prog: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a file, and those that would run code and are not believed, as they are in a run's directory.

    Raises:
        ConfigError: it cannot be read, or is of another command; or settings are unknown, given twice or of a wrong
            type: the message lists all of them.
    """
    content = _content(Path(path).expanduser())
    is_run = isinstance(content.get("options"), dict)
    command = prog.removeprefix("eggroll ")
    passed_over: set[str] = set()
    if is_run:
        from eggroll.lifecycle import kind_name

        found = kind_name(content)
        if found != command and not (found == "tune" and command in ALSO_TUNE):
            raise ConfigError(f"--config {path} is of a run of eggroll {found}, not of {prog}")
        content = {key: value for key, value in content["options"].items() if key not in ("output", *ONLY_TYPED)}
    if command == "info" or (is_run and command in ALSO_TUNE):
        from eggroll.llm.options import TuneOptions

        passed_over = set(_names(TuneOptions))
    values = _values(content, kind, path, passed_over)
    code = {name: value for name, value in values.items() if is_run and _runs_code(kind, name, value)}
    for name in _believed(Path(path).expanduser()) if code else ():
        code.pop(name, None)
    return {name: value for name, value in values.items() if name not in code}, code


def _content(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        hint = f"; give {path / 'config.json'}" if (path / "config.json").exists() else ""
        raise ConfigError(f"--config {path} is a directory, not a file of settings{hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=2, cutoff=0.5)
        hint = f"; near matches: {', '.join(near)}" if near else ""
        raise ConfigError(f"--config {path}: there is no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    if path.suffix.lower() == ".json":
        try:
            found = reading.parse(text)
        except ValueError as error:
            raise ConfigError(f"--config {path} is not valid JSON: {error}") from None
    else:
        yaml: Any = require("yaml", extra="llm")
        try:
            found = yaml.safe_load(text)
            json.dumps(found, default=str)  # lists within themselves and keys that are no names end here
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"--config {path} is not YAML that holds settings: {' '.join(str(error).split())}"
            ) from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"--config {path} must hold settings by name, such as 'sigma: 0.01', one a line; it holds "
            f"{'a list' if isinstance(found, list) else 'a single value'}"
        )
    return found


def _values(content: Mapping[str, Any], kind: type[Any], path: str, passed_over: set[str]) -> dict[str, Any]:
    names, hints = _names(kind), typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    problems = []
    for key, value in content.items():
        plain = str(key).strip().removeprefix("--").replace("-", "_")
        name = names.get(plain)
        if name in ONLY_TYPED or plain == CONFIG:
            problems.append(f"{key} is about one command; give {flag_of(plain)} on the command line")
        elif name is None and plain not in passed_over:
            near = dict.fromkeys(names[word] for word in difflib.get_close_matches(plain, names, n=2))
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            problems.append(f"unknown setting {key!r}{hint}")
        elif name in values:
            problems.append(f"{key} gives {name} a second time")
        elif name is not None:
            values[name] = _number(value, hints[name])
    problems += wrong_types(kind, values)
    for name, value in values.items():
        choices = _choices(hints[name])
        if choices and isinstance(value, str) and value not in choices:
            close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(f"{name} (={value!r}) must be one of: {', '.join(choices)}{hint}")
    if problems:
        raise ConfigError.from_problems(f"--config {path}", problems)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _choices(hint: Any) -> tuple[str, ...]:
    """The words that a type allows, be it that or null; empty for other types."""
    literals = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is typing.Literal]
    others = set(typing.get_args(hint)) - set(literals) - {types.NoneType}
    words = typing.get_args(literals[0]) if len(literals) == 1 else ()
    return words if literals[:1] == [hint] or not others else ()


def _names(kind: type[Any]) -> dict[str, str]:
    """What a setting may be called in a file: its name, and its long flags; to the field."""
    found = {field.name: field.name for field in dataclasses.fields(kind)}
    for name in list(found):
        for flag in about(kind, name).get("flags", ()):
            if flag.startswith("--"):
                found.setdefault(flag.removeprefix("--").replace("-", "_"), name)
    return found


def _number(value: Any, hint: Any) -> Any:
    """``1e-3`` is text in YAML 1.1, which wants a point in it; where a number belongs, it is one."""
    parts = typing.get_args(hint) or (hint,)
    if isinstance(value, list) and float in parts:  # a tuple of numbers
        return [_number(item, float) for item in value]
    if isinstance(value, str) and float in parts and str not in parts:
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _typed(values: Mapping[str, Any]) -> list[str]:
    """Settings as they would be typed, as far as the defaults of others depend on them."""
    return [f"{flag_of(name)}={value}" for name, value in values.items() if isinstance(value, str | int | float)]


def _runs_code(kind: type[Any], name: str, value: Any) -> bool:
    rule = about(kind, name).get("runs_code")
    return bool(rule is not None and value is not None and rule(value))


def _believed(path: Path) -> Sequence[str]:
    """Names of settings that run code, in a run that this user started on this machine with them."""
    from eggroll.cli.kinds import kind_of
    from eggroll.lifecycle.opening import options_of_run
    from eggroll.lifecycle.trust import believed, code_of
    from eggroll.run.run_dir import RunDir

    if path.name != "config.json":
        return ()
    try:
        run = RunDir.open(path.parent)
        kind = kind_of(run)
        return list(code_of(believed(options_of_run(kind, run.path), run)))
    except (EggrollError, OSError):
        return ()


def _default(kind: type[Any], name: str) -> Any:
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def _flag(name: str, value: Any) -> str:
    import shlex

    if isinstance(value, bool):
        return flag_of(name)
    text = str(value)
    return f"{flag_of(name)} {shlex.quote(text) if text.isprintable() else json.dumps(text)}"
