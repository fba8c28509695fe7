"""Worlds in an evaluator: conversations in the place of completions, and what rewards get of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.errors import RewardError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example
from eggroll.llm.rewards import Reward
from eggroll.llm.worlds.host import Host, Hosting
from eggroll.llm.worlds.processes import ProcessHost
from eggroll.llm.worlds.reward import ENVIRONMENTS, SCORE, WorldReward, world_of
from eggroll.llm.worlds.rollout import Conversation, Limits, Played, Speaker, Stage


class WorldFailureWarning(UserWarning):
    """Worlds have failed; their conversations have the score that is set for that."""


@dataclass
class Counts:
    """What conversations of a generation came to: how many, how many failed, completions made."""

    conversations: int = 0
    failed: int = 0
    turns: int = 0

    def metrics(self) -> dict[str, float]:
        """Means over conversations."""
        if not self.conversations:
            return {}
        total = self.conversations
        return {"worlds/turns": self.turns / total, "worlds/failed_fraction": self.failed / total}


@dataclass(frozen=True)
class Talk:
    """Conversations as rewards get them: those whose world has not failed.

    Attributes:
        rows: all of them, also those that failed.
        prompts: what models read first.
        completions: what was said after that, as messages.
        texts: what models said last.
        columns: the data set's, and the worlds' scores.
        tokens: that were generated.
    """

    rows: list[Conversation]
    prompts: list[Any]
    completions: list[Any]
    texts: list[str]
    columns: dict[str, list[Any]]
    tokens: int = 0

    @property
    def kept(self) -> int:
        """How many have not failed."""
        return len(self.prompts)


@dataclass
class Scores:
    """Scores of some rows: ``values (rows,)``, what was written (text rewards only), tokens processed.

    ``extra`` are columns that a reward has logged, with a value for each row; ``unscored (rows,)`` are the rows whose
    value stands for nothing. Where worlds are, completions are lists of messages, and ``prompts`` what conversations
    began with.
    """

    values: NDArray[np.float64]
    completions: Sequence[Any] = field(default_factory=list)
    tokens: int = 0
    extra: dict[str, list[Any]] = field(default_factory=dict)
    prompts: Sequence[Any] | None = None
    unscored: NDArray[np.bool_] | None = None

    def missing(self, members: int) -> NDArray[np.bool_]:
        """``unscored`` member by member, ``(members, rows of each)``."""
        return (np.zeros(self.values.size, bool) if self.unscored is None else self.unscored).reshape(members, -1)


class Worlds:
    """The worlds of a run.

    Args:
        part: the reward that has them.
        reward: the whole reward.
        tokenizer: the model's.
        config: the run's settings.
        ends: tokens that end a completion.
    """

    def __init__(
        self, part: WorldReward, reward: Reward, tokenizer: Any, config: EggrollConfig, ends: Sequence[int]
    ) -> None:
        self.part, self.config = part, config
        host: Hosting
        if config.world_workers:
            host = ProcessHost(part.world, config.world_timeout, part.name, config.world_workers)
        else:
            host = Host(part.world, config.world_timeout, part.name)
        limits = Limits(config.max_turns, config.max_length)
        self.stage = Stage(
            host, tokenizer, limits, ends=ends, system=config.system, scored=part.scored, show=shows(reward)
        )
        self.counts = Counts()
        self._told: set[str] = set()
        self._held = False

    @classmethod
    def of(cls, reward: Reward, tokenizer: Any, config: EggrollConfig, ends: Sequence[int]) -> Worlds | None:
        """Those that a reward has, if any."""
        part = world_of(reward)
        return None if part is None else cls(part, reward, tokenizer, config, ends)

    def hold(self, batch: Sequence[Example], speaker: Speaker, copies: int) -> Talk:
        """Hold the conversations of ``copies`` members about each row of a batch, member by member.

        Raises:
            RewardError: every single one of the run's first conversations has failed.
        """
        played = self.stage.play(batch, speaker, copies)
        self._report(played)
        kept = [row for row in played.rows if row.failure is None]
        columns = {name: [row.columns.get(name) for row in kept] for name in _names(batch)}
        columns[SCORE] = [row.score for row in kept]
        if self.stage.show:
            columns[ENVIRONMENTS] = [row.environment for row in kept]
        return Talk(
            rows=played.rows,
            prompts=[row.opening for row in kept],
            completions=[row.messages for row in kept],
            texts=[row.text for row in kept],
            columns=columns,
            tokens=played.tokens,
        )

    def scores(
        self,
        values: NDArray[np.float64],
        talk: Talk,
        extra: Mapping[str, list[Any]],
        unscored: NDArray[np.bool_] | None = None,
    ) -> Scores:
        """Scores of all rows, with the one that is set for failures in the place of those that a world has spoiled.

        Args:
            values: ``(kept,)`` or ``(rows,)`` what rewards say.
            talk: the conversations.
            extra: what rewards have logged, for the rows that were kept.
            unscored: which of ``values`` stand for nothing; what a world has spoiled has a score, the one for that.
        """
        there = np.array([row.failure is None for row in talk.rows], dtype=np.bool_)
        all_of_them = np.full(len(talk.rows), self.config.world_failure_score, dtype=np.float64)
        all_of_them[there] = values[there] if len(values) == len(talk.rows) else values
        logged: dict[str, list[Any]] = {
            "turns": [row.turns for row in talk.rows],
            "end": [row.end if row.failure is None else f"failed: {row.failure.text}" for row in talk.rows],
        }
        for name, found in extra.items():
            each = iter(found)
            logged[name] = list(found) if len(found) == len(there) else [next(each) if ok else None for ok in there]
        completions, prompts = [row.messages for row in talk.rows], [row.opening for row in talk.rows]
        without = None
        if unscored is not None:
            without = np.zeros(len(talk.rows), dtype=np.bool_)
            without[there] = unscored[there] if len(unscored) == len(talk.rows) else unscored
        return Scores(all_of_them, completions, talk.tokens, logged, prompts, without)

    def take_counts(self) -> dict[str, float]:
        """Metrics of the conversations since the last call."""
        found, self.counts = self.counts.metrics(), Counts()
        return found

    def _report(self, played: Played) -> None:
        failures, total = played.failures(), len(played.rows)
        self.counts.conversations += total
        self.counts.failed += sum(failures.values())
        self.counts.turns += sum(row.turns for row in played.rows)
        if not self._held and sum(failures.values()) == total:
            raise RewardError(f"every one of the first {total} conversations failed; {failures.most_common(1)[0][0]}")
        self._held = True
        for text, count in failures.items():
            kind = f"{self.part.name} {text[:60]}"
            if kind not in self._told:
                self._told.add(kind)
                warnings.warn(
                    f"{text} ({count} of {total} conversations; each scores {self.config.world_failure_score:g}, "
                    "--world-failure-score). Later ones are counted as worlds/failed_fraction in metrics.jsonl",
                    WorldFailureWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """End what worlds still run."""
        self.stage.host.close()


def shows(reward: Reward) -> bool:
    """Whether a part of a reward asks for the worlds themselves."""
    import inspect

    for part, _ in reward.parts:
        for function in (*getattr(part, "functions", ()), *filter(None, [getattr(part, "scorer", None)])):
            try:
                if ENVIRONMENTS in inspect.signature(function).parameters:
                    return True
            except (TypeError, ValueError):
                continue
    return False


def _names(batch: Sequence[Example]) -> list[str]:
    return list(dict.fromkeys(name for example in batch for name in example.columns))


__all__ = ["Scores", "Talk", "WorldFailureWarning", "Worlds"]
