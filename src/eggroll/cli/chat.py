"""``eggroll chat``: ask a model questions; a run's before and after training, side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from eggroll.cli.asking import Asked, AskOptions, Subject, subjects, writer
from eggroll.core.settings import setting
from eggroll.errors import DataError
from eggroll.run.terminal import Terminal, printable

if TYPE_CHECKING:
    from eggroll.llm.config import EggrollConfig
    from eggroll.llm.measure.answers import Conversation

NEW, EXIT = "/new", ("/exit", "/quit")


@dataclass(frozen=True, kw_only=True)
class Questions(Asked):
    """What is asked of which models."""

    question: str | None = setting(None, flags=("-q",))
    """Ask this and leave (default: what is typed, or each line of standard input)."""
    only: Literal["after", "before"] | None = None
    """Of a run, ask the trained model (after) or the one that it started from (before) alone."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(AskOptions, Questions):
    """Everything that ``eggroll chat`` can be told."""


OPTIONS = ChatOptions


def run(options: ChatOptions) -> int:
    """Ask a model questions as it was trained to be asked; a run's before and after training, side by side."""
    console = Terminal(soft_wrap=True, highlight=False)
    notes = Terminal(stderr=True, soft_wrap=True, highlight=False)
    interactive = options.question is None and sys.stdin is not None and sys.stdin.isatty()
    asked, config = subjects(options, "chat", () if options.only is None else (options.only,))
    given = None if interactive else _given(options)
    chat = _Chat(options, asked, config, console, notes)
    if given is None:
        chat.introduce()
        chat.converse()
    else:
        chat.answer_each(given)
    return 0


def _given(options: ChatOptions) -> list[str]:
    """The questions of the command line, or of standard input.

    Raises:
        DataError: there is none, or what is there is no text.
    """
    if options.question is not None:
        found = [options.question]
    else:
        try:
            found = [] if sys.stdin is None else sys.stdin.read().splitlines()
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input is no text in {error.encoding}: {error.reason}; save it as UTF-8"
            ) from None
    found = [line for line in found if line.strip()]
    if not found:
        what = "standard input has none, one a line" if options.question is None else "--question is empty"
        raise DataError(f'there is no question: {what}. Give one with -q "..."')
    return found


class _Chat:
    """Conversations with one or two models."""

    def __init__(
        self, options: ChatOptions, asked: list[Subject], config: EggrollConfig, console: Console, notes: Console
    ) -> None:
        self.options, self.asked, self.config, self.console, self.notes = options, asked, config, console, notes
        self.writers = [writer(subject, config, options, notes) for subject in asked]
        self.number = 0
        self.renew()

    def renew(self) -> None:
        """Start new conversations."""
        from eggroll.llm.measure.answers import Conversation

        self.conversations: list[Conversation] = [Conversation(one) for one in self.writers]

    def introduce(self) -> None:
        """Who is asked, how, and how one leaves."""
        config, say = self.config, self.notes.print
        names = " and ".join(dict.fromkeys(subject.model for subject in self.asked))
        how = "greedy" if config.temperature == 0 else f"temperature {config.temperature:g}, seed {config.seed}"
        say(f"[bold]{escape(names)}[/]  {how}, at most {config.max_tokens} tokens an answer")
        if config.system:
            say(f"system prompt: {escape(config.system)}")
        if not self.writers[0].converses:
            say("questions are put as they are, without a chat template, so each stands alone")
        say(f"[dim]{NEW} begins a new conversation, {EXIT[0]} or Ctrl-D leaves; Ctrl-C stops an answer[/]")

    def converse(self) -> None:
        """Ask what is typed until its end."""
        for question in _typed():
            if question == NEW:
                self.renew()
                self.notes.print("[dim]a new conversation[/]")
            elif question.startswith("/") and " " not in question:
                self.notes.print(f"[dim]there is {NEW} and {EXIT[0]}, and no {escape(question)}[/]")
            else:
                before = [list(conversation.turns) for conversation in self.conversations]
                try:
                    self.show(self.answers(question))
                except KeyboardInterrupt:
                    for conversation, turns in zip(self.conversations, before, strict=True):
                        conversation.turns = turns
                    self.notes.print("\n[dim]stopped; this question is not a part of the conversation[/]")

    def answer_each(self, questions: list[str]) -> None:
        """Answer questions that have nothing to do with each other."""
        for number, question in enumerate(questions):
            self.renew()
            answers = self.answers(question)
            if len(questions) > 1 and len(answers) > 1:
                self.console.print(f"{'' if number == 0 else chr(10)}[bold]{escape(question)}[/]")
            self.show(answers)

    def answers(self, question: str) -> list[str]:
        """What each model says."""
        self.number += 1
        found = []
        for subject, conversation in zip(self.asked, self.conversations, strict=True):
            with self.notes.status(f"{escape(subject.label)} ..."):
                found.append(conversation.ask(question, self.number).strip())
        return found

    def show(self, answers: list[str]) -> None:
        """Print one answer as it is; two side by side on a terminal, and one below the other elsewhere."""
        texts = [printable(answer) for answer in answers]
        if len(texts) == 1:
            self.console.print(Text(texts[0]))
        elif self.console.is_terminal:
            table = Table(expand=True)
            for subject in self.asked:
                table.add_column(subject.label, ratio=1, overflow="fold")
            table.add_row(*map(Text, texts))
            Terminal(highlight=False).print(table)
        else:
            for subject, text in zip(self.asked, texts, strict=True):
                self.console.print(Text(f"{subject.label:7} {text}"))


def _typed() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D or /exit. Ctrl-C drops the line."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() a history and keys to edit with)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n({EXIT[0]} or Ctrl-D leaves)", file=sys.stderr)
            continue
        if line in EXIT:
            return
        if line:
            yield line
