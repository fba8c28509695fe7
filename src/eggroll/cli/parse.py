"""From a dataclass of settings to a command line: flags, their other names and their texts are those of its fields."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, TypeVar, cast, get_type_hints

from eggroll.cli.helping import ALL, WORDS, Option, lines, options
from eggroll.cli.values import read_values
from eggroll.core.config import ESConfig
from eggroll.core.settings import about
from eggroll.errors import ConfigError
from eggroll.run.terminal import Terminal, printable

Options = TypeVar("Options")
ON_THE_COMMAND_LINE = {
    "when antithetic=True": "with --sampling antithetic",
    "antithetic=False": "--sampling one_sided",
    "use None for all matrices": "leave it out for all matrices",
}
"""Words of the settings in Python whose advice is another one here."""
CONFIG = "config"
"""The option that names a file of settings, see :mod:`eggroll.cli.config_file`."""
CONFIG_TEXT = "Settings from a YAML or JSON file, or from a run's config.json; flags count more."


def parse(
    kind: type[Options],
    arguments: Sequence[str],
    *,
    prog: str,
    description: str,
    default: Options | None = None,
    given: Mapping[str, Any] | None = None,
    config: str | None = None,
) -> Options:
    """The options that a command line gives, in the place of ``given`` and of those of ``default``.

    Args:
        kind: the options' dataclass.
        arguments: the command line.
        prog: the command as it is typed.
        description: for ``--help``.
        default: the options of a command line that says nothing; ``None`` takes the fields' defaults.
        given: values of the file that ``--config`` names; ``None`` for a command without that option.
        config: that file.

    Raises:
        SystemExit: --help was asked for, or the command line is wrong, which has been said then.
        ConfigError: settings that cannot work.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    known = {} if default is None else {name: getattr(default, name) for name in names}
    if given:
        known = _defaults(kind) | known | dict(given)
    shown = {name: _printable(value) for name, value in known.items()}
    told = options(kind, field_texts(cast(Any, kind)), shown, None if given is None else CONFIG_TEXT)
    if not WORDS.isdisjoint(arguments):
        _print_help(prog, description, told, everything=ALL in arguments)
        raise SystemExit(0)
    if unknown := _unknown(arguments, [flag for option in told for flag in option.flags]):
        print(printable(f"{unknown}. {prog} {ALL} shows every option"), file=sys.stderr)
        raise SystemExit(2)
    arguments, wrong = read_values(told, get_type_hints(kind), arguments)
    if wrong:
        print(printable("\n".join((*wrong, f"{prog} {ALL} shows every option"))), file=sys.stderr)
        raise SystemExit(2)
    import tyro

    command = command_type(cast(Any, kind), given is not None)
    absent: Any = command(**shown) if shown else tyro.MISSING_NONPROP
    typed = tyro.cli(command, args=arguments, prog=prog, description=description, default=absent)
    if given is not None and getattr(typed, CONFIG) != config:
        raise ConfigError(f"{prog} takes one --{CONFIG} FILE, given once and with its whole name")
    found = {name: getattr(typed, name) for name in names}
    found |= {name: known[name] for name, value in shown.items() if found[name] == value}
    # Checked here, so that what cannot work is said in the words of the settings.
    try:
        return kind(**found)
    except ConfigError as error:
        text = str(error).replace(kind.__name__, prog, 1)
        for words, here in ON_THE_COMMAND_LINE.items():
            text = text.replace(words, here)
        raise type(error)(text) from None


def _unknown(arguments: Sequence[str], flags: Sequence[str]) -> str:
    """Which long options there are not, and what may be meant; empty if all are known."""
    given = [word.partition("=")[0] for word in arguments if word.startswith("--") and word != "--"]
    unknown = [flag for flag in dict.fromkeys(given) if flag.replace("_", "-") not in flags]
    if not unknown:
        return ""
    near = [difflib.get_close_matches(flag.replace("_", "-"), flags, n=1) for flag in unknown]
    meant = ", ".join(dict.fromkeys(flag for found in near for flag in found))
    return f"Unrecognized options: {', '.join(unknown)}" + (f". Perhaps you meant {meant}" if meant else "")


def _print_help(prog: str, description: str, told: Sequence[Option], *, everything: bool) -> None:
    console = Terminal(highlight=False, markup=False, soft_wrap=True)
    for line in lines(prog, description, told, everything=everything, width=console.width):
        console.print(line, style="bold" if line.endswith(":") and not line.startswith(" ") else None)


def _defaults(kind: Any) -> dict[str, Any]:
    import tyro

    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = tyro.MISSING_NONPROP if value is dataclasses.MISSING else value
    return found


def _printable(value: Any) -> Any:
    """A default as the parser shows it: it may come from a run's directory, see :mod:`eggroll.run.terminal`."""
    if isinstance(value, tuple | list):
        return type(value)(map(_printable, value))
    return printable(value) if isinstance(value, str) else value


@cache
def command_type(kind: Any, takes_config: bool = False) -> Any:
    """A dataclass with the fields of ``kind`` (and ``--config``), annotated for tyro, that checks nothing."""
    import tyro

    hints: dict[str, Any] = get_type_hints(kind, include_extras=True)
    texts = field_texts(kind)
    namespace: dict[str, Any] = {"__annotations__": {}, "__doc__": kind.__doc__, "__module__": kind.__module__}
    for field in dataclasses.fields(kind):
        hint, told = hints[field.name], about(kind, field.name)
        if told.get("positional"):
            hint = tyro.conf.Positional[hint]  # type: ignore[misc,valid-type]
        if told.get("hidden"):
            hint = tyro.conf.Suppress[hint]  # type: ignore[misc,valid-type]
        argument = tyro.conf.arg(
            help=texts.get(field.name, ""),
            aliases=[flag.replace("_", "-") for flag in told.get("flags", ())] or None,  # tyro takes both for these
            metavar=told.get("positional") or None,
        )
        namespace["__annotations__"][field.name] = Annotated[hint, argument]
        namespace[field.name] = dataclasses.field(
            default=field.default, default_factory=field.default_factory, metadata=field.metadata
        )  # type: ignore[call-overload]
    if takes_config:
        argument = tyro.conf.arg(help=CONFIG_TEXT)
        namespace["__annotations__"][CONFIG] = Annotated[str | None, argument]
        namespace[CONFIG] = None
    return dataclasses.dataclass(frozen=True, kw_only=True)(type(kind.__name__, (), namespace))


@cache
def field_texts(kind: Any) -> dict[str, str]:
    """The docstrings below the fields of a dataclass and of its bases; a field without one has that of its base.

    Options that are not an ``ESConfig`` but make one (``--rank`` of ``eggroll rl``) have the texts of its fields.
    """
    found: dict[str, str] = {}
    for base in (ESConfig, *reversed(kind.__mro__)):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cast(type, base))))
        except (OSError, TypeError):  # no source is installed
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for one, after in pairwise(body):
            if not (isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = re.sub(r":\w+:`~?([^`]*)`", r"\1", str(after.value.value)).replace("``", "")
                found[one.target.id] = " ".join(text.split())
    return found
