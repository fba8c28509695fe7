"""Whole conversations of many rows with their worlds: at each turn, the rows that still play are generated together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eggroll.errors import DataError
from eggroll.llm.data.examples import Example
from eggroll.llm.generation.chat import Message, last_answer
from eggroll.llm.generation.encode import encode_prompts
from eggroll.llm.worlds.chat import Chat
from eggroll.llm.worlds.host import Hosting
from eggroll.llm.worlds.toolcalls import calls_in, described, knows_tools
from eggroll.llm.worlds.world import Completion, Failure, Opening, Turn


class Speaker(Protocol):
    """Lets rows of a batch say something, with the weights of their members."""

    def say(self, rows: Sequence[int], ids: Sequence[list[int]], turn: int) -> list[list[int]]:
        """The completions of some rows as token ids, without end tokens.

        Args:
            rows: their numbers, in ascending order; a row that is left out once does not come again.
            ids: of each the whole conversation so far.
            turn: how many completions they have made.
        """


@dataclass
class Conversation:
    """What was said in one row, and what came of it.

    Attributes:
        opening: the messages that the model read first.
        messages: all that came after: the model's turns, the world's messages.
        score: the world's; ``None`` without one.
        failure: why there is none that counts.
        end: ``done``, ``turns`` or ``length`` (a limit was reached), or ``failed``.
        turns: completions of the model.
        environment: the world itself, where somebody asks for it.
    """

    opening: list[Message] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    score: float | None = None
    failure: Failure | None = None
    end: str = ""
    turns: int = 0
    environment: Any = None
    columns: dict[str, Any] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What the model said last."""
        return last_answer(self.messages)


@dataclass
class Played:
    """All conversations of a batch, row by row, and the tokens that were generated."""

    rows: list[Conversation]
    tokens: int = 0

    def failures(self) -> Counter[str]:
        """How many failed, and of what: the texts of their failures."""
        return Counter(row.failure.text for row in self.rows if row.failure is not None)


@dataclass(frozen=True)
class Limits:
    """When a conversation ends by itself.

    Attributes:
        max_turns: completions.
        max_length: tokens that a model reads; a conversation that gets longer is over.
    """

    max_turns: int
    max_length: int


class Stage:
    """Where conversations are held.

    Args:
        host: where the worlds live.
        tokenizer: the model's, with a chat template.
        limits: when a conversation ends by itself.
        ends: tokens that end a completion.
        system: a system message for conversations without one.
        scored: whether the worlds are to give a score.
        show: keep the worlds themselves for rewards that look at them.
    """

    def __init__(
        self, host: Hosting, tokenizer: Any, limits: Limits, *, ends: Sequence[int], system: str | None = None,
        scored: bool = True, show: bool = False,
    ) -> None:  # fmt: skip
        self.host, self.tokenizer, self.limits, self.system = host, tokenizer, limits, system
        self.ends, self.scored, self.show = list(ends), scored, show
        self.chat = Chat(tokenizer, ends)

    def play(self, batch: Sequence[Example], speaker: Speaker, copies: int = 1) -> Played:
        """Hold a conversation for each row of ``copies`` times the batch, one copy (a member's) after the other."""
        played = Played([Conversation() for _ in range(copies * len(batch))])
        rows = played.rows
        asked = {index: row_of(batch[index % len(batch)]) for index in range(len(rows))}
        try:
            playing = self._open(rows, batch, self.host.open(asked))
            for turn in range(self.limits.max_turns):
                if not playing:
                    break
                made = speaker.say(playing, [rows[index].ids for index in playing], turn)
                played.tokens += sum(map(len, made))
                playing = self._turn(rows, dict(zip(playing, made, strict=True)))
            for index in playing:
                rows[index].end = "turns"
        finally:
            ended = self.host.end(range(len(rows)), show=self.show)
        for index, row in enumerate(rows):
            score, row.environment = ended.get(index, (None, None))
            self._score(row, score)
        return played

    def _open(
        self, rows: list[Conversation], batch: Sequence[Example], openings: Mapping[int, Opening | Failure]
    ) -> list[int]:
        playing = []
        for index, row in enumerate(rows):
            example, opening = batch[index % len(batch)], openings[index]
            if isinstance(opening, Failure):
                _fail(row, opening)
                continue
            row.columns = {**example.columns, **({"tools": opening.tools} if opening.tools else {})}
            row.opening = self._with_tools(_prompt(example) if opening.messages is None else opening.messages, row)
            playing.append(index)
        known: dict[str, list[int]] = {}
        for index in list(playing):
            row = rows[index]
            key = repr((row.opening, row.columns.get("tools"), row.columns.get("chat_template_kwargs")))
            try:
                known[key] = known.get(key) or self._read(row)
            except DataError as error:
                _fail(row, Failure("wrong", f"what the conversation begins with cannot be put to the model: {error}"))
                playing.remove(index)
            else:
                row.ids = list(known[key])
        return playing

    def _read(self, row: Conversation) -> list[int]:
        encoded = encode_prompts(
            self.tokenizer, [row.opening], self.limits.max_length, system=self.system, columns=[row.columns],
            ends=self.ends,
        )  # fmt: skip
        return encoded.input_ids[0]

    def _with_tools(self, messages: list[Message], row: Conversation) -> list[Message]:
        """The opening; with the functions in its system message where the template knows none."""
        tools = row.columns.get("tools")
        if not tools or not isinstance(tools, list) or knows_tools(self.tokenizer, tools):
            return messages
        del row.columns["tools"]
        own = messages[0]["content"] if messages and messages[0]["role"] == "system" else self.system
        text = "\n\n".join(filter(None, [own, described(tools)]))
        rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
        row.columns["described_tools"] = tools
        return [{"role": "system", "content": text}, *rest]

    def _turn(self, rows: list[Conversation], made: Mapping[int, list[int]]) -> list[int]:
        """What the worlds answer; returns the rows that go on."""
        said = {}
        texts = self.tokenizer.batch_decode(list(made.values()), skip_special_tokens=True)
        for (index, tokens), text in zip(made.items(), texts, strict=True):
            row = rows[index]
            tools = row.columns.get("tools") or row.columns.get("described_tools") or []
            calls = calls_in(self.tokenizer, text, tokens, row.ids, tools)
            message: Message = {"role": "assistant", "content": text}
            if calls:
                message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            row.messages.append(message)
            row.ids += tokens
            row.turns += 1
            said[index] = Completion(text, calls)
        going = []
        for index, turn in self.host.step(said).items():
            row = rows[index]
            if isinstance(turn, Failure):
                _fail(row, turn)
            elif self._answered(row, turn):
                going.append(index)
        return sorted(going)

    def _answered(self, row: Conversation, turn: Turn) -> bool:
        """Take what the world has said; returns whether the conversation goes on."""
        messages = turn.messages if isinstance(turn.messages, list) else []
        row.score = row.score if turn.score is None else turn.score
        row.messages += messages
        if turn.done:
            row.end = "done"
            return False
        if row.turns >= self.limits.max_turns:
            row.end = "turns"
            return False
        try:
            row.ids += self.chat.after(messages, row.columns)
        except DataError as error:
            _fail(row, Failure("wrong", f"what the world said cannot be put to the model: {error}"))
            return False
        if len(row.ids) > self.limits.max_length:
            row.end = "length"
            return False
        return True

    def _score(self, row: Conversation, ended: Any) -> None:
        """Put the last word on a conversation's score."""
        if row.failure is not None:
            return
        if isinstance(ended, Failure):
            _fail(row, ended)
        elif row.score is None:
            row.score = ended
        if row.score is None and self.scored and row.failure is None:
            _fail(row, Failure("score", "the world gave no score: neither a turn has one, nor score()"))


def row_of(example: Example) -> dict[str, Any]:
    """A row of the data set as a world gets it."""
    return {"prompt": example.prompt, **example.columns}


def _prompt(example: Example) -> list[Message]:
    """A row's own prompt as a conversation."""
    prompt = example.prompt or ""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def _fail(row: Conversation, failure: Failure) -> None:
    row.failure, row.end, row.score = failure, "failed", None


__all__ = ["Conversation", "Limits", "Played", "Speaker", "Stage", "row_of"]
