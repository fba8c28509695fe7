"""``eggroll generate``: a model's completions of the prompts of a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from eggroll.cli.asking import Asked, AskOptions, check_output, subjects, writer
from eggroll.core.settings import setting
from eggroll.errors import ConfigError
from eggroll.run.terminal import Terminal, printable

if TYPE_CHECKING:
    from eggroll.llm.data.examples import Example
    from eggroll.llm.measure.answers import Writer


@dataclass(frozen=True, kw_only=True)
class Prompts(Asked):
    """What is completed, and where that is written."""

    file: str = setting(positional="FILE")
    """Prompts: .jsonl, .txt (one a line), .csv, .parquet, a folder, or a hub id, as for eggroll tune --prompts."""
    output: str | None = setting(None, flags=("-o",))
    """A .jsonl file for prompts and completions (default: standard output)."""
    batch_size: int = 16
    """Prompts answered together."""
    only: Literal["after", "before"] = "after"
    """Of a run: the trained model (after), or the one that it started from (before)."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AskOptions, Prompts):
    """Everything that ``eggroll generate`` can be told."""


OPTIONS = GenerateOptions


def run(options: GenerateOptions) -> int:
    """Write a model's completions of the prompts of a file as JSON lines; what is done is kept at Ctrl-C."""
    from eggroll.llm.data.examples import check_source, load_examples, prompts_of
    from eggroll.run.interrupt import terminate_as_interrupt

    console = Terminal(stderr=True, soft_wrap=True, highlight=False)
    if options.batch_size < 1:
        raise ConfigError(f"eggroll generate: batch_size (={options.batch_size}) must be at least 1")
    asked, config = subjects(options, "generate", (options.only,))
    check_source(options.file)
    if options.output is not None:
        check_output(Path(options.output), "answers.jsonl")
        _check_apart(Path(options.output), Path(options.file).expanduser())
    examples = load_examples(options.file)
    prompts_of(examples)  # raises
    made = writer(asked[0], config, options, console)
    done = 0
    with _opened(options.output) as file, _Bar(asked[0].model, len(examples), console) as bar:
        try:
            with terminate_as_interrupt():
                for done in _written(made, examples, options.batch_size, file):
                    bar.show(done)
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = False
    where = "" if options.output is None else f" in {escape(options.output)}"
    if interrupted:
        console.print(f"interrupted: {done} of {len(examples)} completions are{where or ' written'}")
        return 130
    if options.output is not None:
        console.print(f"{len(examples)} completion{'' if len(examples) == 1 else 's'}{where}")
    return 0


def _written(made: Writer, examples: list[Example], batch_size: int, file: TextIO) -> Iterator[int]:
    """Write completions batch by batch; gives how many there are by then."""
    from eggroll.run.interrupt import uninterrupted

    shown = printable if file.isatty() else str
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        completions, _ = made.write(batch, first)
        rows = [_row(example, completion) for example, completion in zip(batch, completions, strict=True)]
        with uninterrupted():  # no half of a line
            file.writelines(f"{shown(json.dumps(row, ensure_ascii=False, default=str))}\n" for row in rows)
            file.flush()
        yield first + len(batch)


def _row(example: Example, completion: str) -> dict[str, Any]:
    """Prompt, completion, and the other columns of the prompt's row."""
    others = {name: value for name, value in example.columns.items() if name not in ("prompt", "completion")}
    return {"prompt": example.prompt, "completion": completion, **others}


@contextmanager
def _opened(output: str | None) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    with open(output, "w", encoding="utf-8", newline="\n") as file:
        yield file


def _check_apart(output: Path, prompts: Path) -> None:
    """Refuse to write over the prompts."""
    if output.exists() and prompts.exists() and os.path.samefile(output, prompts):
        raise ConfigError(f"--output {output} is the file of the prompts, which would be lost; give another name")


class _Bar:
    """A progress bar on standard error; lines, one for each tenth, where that is no terminal."""

    def __init__(self, model: str, total: int, console: Console) -> None:
        self.model, self.total, self.console, self.next = model, total, console, 0.1
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar = self.progress.add_task(escape(model), total=total)

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, done: int) -> None:
        """Show how far it is."""
        self.progress.update(self.bar, completed=done)
        if not self.console.is_terminal and done >= self.next * self.total:
            self.console.print(f"{escape(self.model)}: {done} of {self.total}")
            self.next = done / self.total + 0.1
