"""A language model as the judge of answers, over an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eggroll import _environment
from eggroll.errors import RewardError
from eggroll.llm.generation.chat import plain_text
from eggroll.llm.rewards.base import UNSCORED, Need, Prompt, Reward
from eggroll.llm.rewards.event_loop import finished
from eggroll.llm.rewards.judge_cache import Grade, GradeCache, key_of
from eggroll.llm.rewards.judge_client import JudgeClient, UnansweredError
from eggroll.llm.rewards.judge_text import RUBRIC, UnreadableError, messages, score_in
from eggroll.llm.rewards.notes import current_notes

GIVE_UP = 16
"""So many answers in a row without a grade, and no further ones are sent in this batch: the judge is not there."""
_VERSION = 1  # of the words around the criteria; other words, other grades


class JudgeReward(Reward):
    """How good a judge finds the answers, from 0 (its lowest score) to 1 (its highest).

    ::

        reward = JudgeReward("http://localhost:8000/v1", "Qwen/Qwen2.5-7B-Instruct", criteria="Polite, and in French.")
        trainer = EggrollTrainer(model, config, reward, tokenizer)

    Answers of a batch are graded side by side, equal ones once, at temperature 0. Grades are kept on disk by model,
    criteria, question and answer, so a generation that is done again has the same scores. The key, if the server wants
    one, is the environment variable ``EGGROLL_JUDGE_KEY``.

    Where the judge fails (no reply after all tries, or none that can be read), the answer is *unscored*, and not bad:
    see :data:`eggroll.llm.rewards.UNSCORED`. More than ``most_unscored`` of a generation end the run with an error,
    before its update, so that it can be resumed.

    Args:
        url: of the endpoint: ``http://host:port/v1``.
        model: the server's name of the model.
        criteria: what counts, in words; a general rubric if not given.
        criteria_file: a text file with them.
        low, high: the judge's range of scores.
        reference: a column of the data set that has a right answer, to be shown to the judge.
        at_once: requests at the same time.
        rate: requests per minute at most, in this process; 0 is without a limit.
        timeout: seconds for one try.
        retries: further tries of a request that failed.
        most_unscored: the share of a generation's answers that may be unscored.
        cache: the file of grades; ``None`` is ``judge/grades.sqlite`` in the cache directory.
        name: for messages and logs.

    Raises:
        RewardError: an argument cannot work, or the file cannot be read.
        MissingExtraError: httpx or tenacity is not installed.
    """

    needs: Need = "text"
    can_fail = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        criteria: str | None = None,
        criteria_file: str | Path | None = None,
        low: float = 0.0,
        high: float = 10.0,
        reference: str | None = None,
        at_once: int = 16,
        rate: float = 0.0,
        timeout: float = 60.0,
        retries: int = 5,
        most_unscored: float = 0.2,
        cache: str | Path | None = None,
        name: str = "judge",
    ) -> None:
        _check(
            (bool(model.strip()), f"model (={model!r}) must be the server's name of the judge"),
            (criteria is None or criteria_file is None, "criteria and criteria_file are given; give one of them"),
            (
                math.isfinite(low) and math.isfinite(high) and low < high,
                f"low (={low}) must be less than high (={high})",
            ),
            (at_once >= 1, f"at_once (={at_once}) must be at least 1"),
            (0 <= rate < math.inf, f"rate (={rate}) must be requests per minute, or 0 for no limit"),
            (0 < timeout < math.inf, f"timeout (={timeout}) must be seconds above 0"),
            (retries >= 0, f"retries (={retries}) must be at least 0"),
            (0 <= most_unscored < 1, f"most_unscored (={most_unscored}) must be a share from 0 to below 1"),
        )
        self.name, self.model, self.reference = name, model, reference
        self.criteria = _criteria(criteria, criteria_file)
        self.low, self.high, self.at_once, self.most_unscored = low, high, at_once, most_unscored
        self.cache = GradeCache(cache)
        self.client = JudgeClient(url, model, rate=rate, timeout=timeout, retries=retries)

    @property
    def notes(self) -> list[str]:
        """Who judges, and what becomes of answers that are not judged."""
        parts = urlsplit(self.client.url)
        open_key = parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")
        warning = [f"{_environment.JUDGE_KEY} goes to {parts.hostname} unencrypted (http)"]
        return [
            f"judge: {self.model} at {parts.netloc}, {self.at_once} requests at once; grades are kept in "
            f"{self.cache.path}. An answer without a grade counts as the mean of its prompt's others; more than "
            f"{self.most_unscored:.0%} of a generation without one end the run, to be resumed",
            *(warning if open_key and _environment.value(_environment.JUDGE_KEY) else []),
        ]

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """One score per completion, from 0 to 1, or :data:`~eggroll.llm.rewards.UNSCORED`; see :meth:`Reward.score`.

        Raises:
            RewardError: the server refuses all questions, or the data set lacks the reference's column.
        """
        if self.reference is not None and self.reference not in (columns or {}):
            there = ", ".join(columns or {}) or "none"
            raise RewardError(
                f"the judge's reference is the column {self.reference!r}; the data set's columns: {there}"
            )
        references = [None] * len(prompts) if self.reference is None else (columns or {})[self.reference]
        texts = [
            (plain_text(prompt), completion, None if right is None else str(right))
            for prompt, completion, right in zip(prompts, completions, references, strict=True)
        ]
        keys = [self._key(*text) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        known = self.cache.find(wanted)
        fresh, failed = finished(self._grades({key: text for key, text in wanted.items() if key not in known}))
        found: dict[str, Grade] = known | fresh
        self._note(keys, found, known, failed)
        return [self._scaled(found[key][0]) if key in found else UNSCORED for key in keys]

    def _scaled(self, score: float) -> float:
        return (score - self.low) / (self.high - self.low)

    def _key(self, question: str, answer: str, reference: str | None) -> str:
        return key_of(
            version=_VERSION, model=self.model, criteria=self.criteria, low=self.low, high=self.high,
            question=question, answer=answer, reference=reference,
        )  # fmt: skip

    async def _grades(
        self, wanted: Mapping[str, tuple[str, str, str | None]]
    ) -> tuple[dict[str, Grade], dict[str, str]]:
        """Grades, and why there is none for the others."""
        found: dict[str, Grade] = {}
        failed: dict[str, str] = {}
        free, in_a_row = asyncio.Semaphore(self.at_once), 0

        async def grade(key: str, question: str, answer: str, reference: str | None) -> None:
            nonlocal in_a_row
            async with free:
                if in_a_row >= GIVE_UP:
                    failed[key] = f"not asked, as {GIVE_UP} answers before it got no reply"
                    return
                asked = messages(
                    question, answer, criteria=self.criteria, low=self.low, high=self.high, reference=reference
                )
                try:
                    reply = await self.client.ask(asked)
                except UnansweredError as error:
                    failed[key] = str(error)
                    in_a_row += 1
                    return
                in_a_row = 0
                try:
                    found[key] = score_in(reply, self.low, self.high), reply
                except UnreadableError as error:
                    failed[key] = f"a reply that cannot be used, {error}"
                    return
                self.cache.add(key, found[key])

        try:
            async with asyncio.TaskGroup() as group:
                for key, text in wanted.items():
                    group.create_task(grade(key, *text))
        except ExceptionGroup as raised:  # the first ends the others
            raise raised.exceptions[0] from None
        return found, failed

    def _note(
        self, keys: Sequence[str], found: Mapping[str, Grade], known: Mapping[str, Grade], failed: Mapping[str, str]
    ) -> None:
        """Log shares, replies and reasons where the evaluator finds them."""
        notes = current_notes()
        for key in keys:
            notes.log_metric(f"{self.name}_failed", float(key in failed))
            notes.log_metric(f"{self.name}_cached", float(key in known))
        notes.extra[f"{self.name} said"] = [found[key][1] if key in found else failed[key] for key in keys]
        notes.reasons += failed.values()

    def __repr__(self) -> str:
        return f"JudgeReward({self.client.url!r}, {self.model!r})"


def _criteria(text: str | None, file: str | Path | None) -> str:
    if file is None:
        found = RUBRIC if text is None else text
    else:
        path = Path(file).expanduser()
        try:
            found = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardError(
                f"the judge's criteria {path} cannot be read: {error}. It must be a text file (UTF-8) that says what a "
                "good answer is"
            ) from error
    if not found.strip():
        raise RewardError(
            "the judge's criteria are empty; say what a good answer is, or leave them out for the default"
        )
    return found


def _check(*claims: tuple[bool, str]) -> None:
    problems = [text for holds, text in claims if not holds]
    if problems:
        raise RewardError(f"JudgeReward: {'; '.join(problems)}")
