"""Entry point of ``eggroll``: picks the command, shows errors as people want to read them."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from eggroll import _environment
from eggroll._streams import forgive
from eggroll.errors import EggrollError, raised_at

COMMANDS = ("tune", "eval", "chat", "generate", "info", "replay", "report", "runs", "rl", "pretrain")
"""Each is a module of this package with ``OPTIONS`` (a dataclass), ``run(options)``, and perhaps
``default_options(arguments)``: defaults that depend on what is typed, such as those of the run that --resume names."""
NAMED = {"rl": "--env", "pretrain": "--data"}
"""Commands without positional arguments, and what one is likely to be."""
EXTRAS = {
    "tune": "llm", "eval": "llm", "chat": "llm", "generate": "llm", "info": "llm", "pretrain": "llm", "rl": "rl",
    "recipe": "recipes",
}  # fmt: skip
"""The extra that brings all that a command needs."""
BROUGHT = {
    "torch": "llm", "transformers": "llm", "safetensors": "llm", "tokenizers": "llm", "datasets": "llm", "jax": "rl",
    "jaxtyping": "rl", "optax": "rl", "gymnax": "rl", "gymnasium": "rl", "plotly": "report",
}  # fmt: skip
"""Modules that an extra brings, and which one; a module that is missing otherwise is a fault, not an extra."""
USAGE = """usage: eggroll COMMAND ...   (eggroll COMMAND --help: the options that matter; --help-all: all of them)

  tune MODEL     evolve a language model on a reward
  eval MODEL     measure a model on a task, or compare two
  chat RUN       ask a run's model questions, before and after side by side; or any model
  generate RUN   write a model's completions of the prompts in a file
  recipe NAME    run a published result: cartpole, mnist, mnist_cnn, rwkv7, profile, hyperscale, or all
  rl --env NAME  evolve a policy on a JAX or Gymnasium environment (--list shows them)
  pretrain       train a language model from scratch in int8 (--data FILE), or sample from one
  info MODEL     show a model's parameters and what a population of it needs
  replay RUN     rebuild the weights of any generation of a run
  report RUN     write a run's report.html, or a page that compares several runs
  runs [FOLDER]  list the runs in a folder; --watch follows them
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted."""
    forgive(sys.stdout, sys.stderr)
    try:
        status = _main(arguments)
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and (error.errno != errno.ENOSPC or error.filename is not None):
            raise
        _unwritten(error)
        return 1
    except SystemExit:  # how the parser leaves
        if not _flushed():
            return 1
        raise
    return status if _flushed() else 1


def _main(arguments: Sequence[str] | None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0] == "--version":
        from eggroll import __version__

        print(f"eggroll {__version__}")
        return 0
    if given[0] not in COMMANDS and given[0] != "recipe":
        near = difflib.get_close_matches(given[0], [*COMMANDS, "recipe"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"eggroll: there is no command {given[0]!r}{hint}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    # tokenizers warns about forks otherwise; completions are decoded in one process anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _environment.wait_passively()
    from eggroll.run.terminal import Terminal, printable

    format_warning = warnings.formatwarning
    warnings.formatwarning = lambda *about, **more: printable(format_warning(*about, **more))
    try:
        if given[0] == "recipe":
            from eggroll.cli.recipe import recipe

            return recipe(given[1:])
        command = load(given[0])
        with _hinting(given[0], given[1:]):
            options = options_of(command, given[1:], prog=f"eggroll {given[0]}")
        status: int = command.run(options)
        return status
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in BROUGHT:
            raise
        from eggroll._optional import missing

        extra = EXTRAS.get(given[0], BROUGHT[module])
        wanted = missing(f"'eggroll {given[0]}' needs {module}, which is not installed", extra)
        Terminal(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escaped(str(wanted))}")
        return 1
    except (EggrollError, OSError, MemoryError, RuntimeError) as error:
        text = explained(error)
        if text is None:
            raise
        console = Terminal(stderr=True, soft_wrap=True, highlight=False)
        console.print(f"[bold red]error:[/] {_escaped(text)}")
        place = raised_at(error)
        for note in dict.fromkeys((*([] if place is None else [place]), *getattr(error, "__notes__", ()))):
            console.print(_escaped(note))
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = format_warning


def explained(error: BaseException) -> str | None:
    """What a user is told of an error; ``None`` for a fault of the program, of which the traceback is worth something.

    Files and memory are the user's. Libraries say about memory what they like: NumPy and Python raise ``MemoryError``,
    PyTorch a ``RuntimeError``, JAX an error of XLA's.
    """
    if isinstance(error, EggrollError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        place = "" if error.filename is None else f": {os.fsdecode(error.filename)!r}"
        return f"{error.strerror}{place}. Check the names that the command was given, and that they can be read"
    told = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return (
            f"there is not enough memory{f' ({told[:200]})' if told else ''}. Use smaller numbers, such as the "
            "population's size, the rank, the batch size or the longest text"
        )
    return None


NO_MEMORY = ("allocate memory", "out of memory", "RESOURCE_EXHAUSTED", "Storage size calculation overflowed")
"""How errors of PyTorch and XLA say it."""


def _flushed() -> bool:
    """Write what is still buffered; whether that worked."""
    try:
        if sys.stdout is not None:  # it was closed
            sys.stdout.flush()
    except OSError as error:
        _unwritten(error)
        return False
    return True


def _unwritten(error: OSError) -> None:
    """Say that standard output cannot be written, unless whoever read it, such as `head`, has gone."""
    if not isinstance(error, BrokenPipeError):
        print(f"error: the output cannot be written: {error.strerror or error}", file=sys.stderr)
    # What is still buffered would raise once more when Python ends.
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def load(name: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"eggroll.cli.{name}")


def options_of(command: ModuleType, arguments: Sequence[str], *, prog: str) -> Any:
    """What a command line says to a command."""
    import dataclasses

    from eggroll.cli.config_file import COMMANDS as CONFIGURED
    from eggroll.cli.config_file import parse_with_file
    from eggroll.cli.parse import parse
    from eggroll.cli.values import in_our_words

    arguments = in_our_words([field.name for field in dataclasses.fields(command.OPTIONS)], arguments)
    description, defaults = command.run.__doc__ or "", getattr(command, "default_options", None)
    if command.__name__.rpartition(".")[2] in CONFIGURED:
        return parse_with_file(command.OPTIONS, arguments, prog=prog, description=description, default_options=defaults)
    default = None if defaults is None else defaults(arguments)
    return parse(command.OPTIONS, arguments, prog=prog, description=description, default=default)


@contextlib.contextmanager
def _hinting(command: str, arguments: Sequence[str]) -> Iterator[None]:
    """Say below the parser's complaint what it cannot know: which tasks there are, and what a bare word should be."""
    try:
        yield
    except SystemExit as left:
        for line in _hints(command, arguments) if left.code == 2 else ():
            print(line, file=sys.stderr)
        raise


def _hints(command: str, arguments: Sequence[str]) -> Iterator[str]:
    from eggroll._command import typed
    from eggroll.cli.watch import option_given
    from eggroll.llm.tasks import names
    from eggroll.llm.tasks.reasoning import PREFIX

    task = option_given(arguments, "--task")
    if command in ("tune", "eval") and task is not None and (not task or task.startswith("-")):
        yield f"--task needs the name of a task after it: {', '.join(names())}, or {PREFIX}NAME"
    if command == "eval" and not arguments:  # the parser takes none for a list of none
        yield f"eval needs a model, or two to compare, and a task: {typed()} eval smollm2-135m --task countdown"
    word = arguments[0] if arguments else "-"
    if command in NAMED and not word.startswith("-"):
        yield f"{word!r} needs the option before it that says what it is: {typed()} {command} {NAMED[command]} {word}"


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    sys.exit(main())
