"""The options of a run that is scored by a judge, and the reward that they mean."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eggroll.core.settings import setting
from eggroll.errors import ConfigError

if TYPE_CHECKING:
    from eggroll.llm.rewards import JudgeReward


def _is_judged(options: Any) -> bool:
    """A judge may move, but not go."""
    return options.judge_url is not None


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How answers are judged by another model."""

    # A judge is sent the answers and the key of whoever runs it, and its criteria are read from a file: so neither is
    # taken from a run of someone else, as little as code is.
    judge_url: str | None = setting(None, resume=_is_judged, runs_code=bool)
    """Let a model behind an OpenAI-compatible server grade the answers: http://host:port/v1. Its key is the variable
    EGGROLL_JUDGE_KEY; with --reward or --task, both scores are added."""
    judge_model: str | None = None
    """The server's name of the judge."""
    judge_prompt: str | None = setting(None, runs_code=bool)
    """A text file that says what a good answer is (default: a general rubric)."""
    judge_reference: str | None = None
    """A column of the data with a right answer, to be shown to the judge."""
    judge_scale: tuple[float, float] = (0.0, 10.0)
    """The judge's lowest and highest score; they become 0 and 1."""
    judge_weight: float = 1.0
    """What the judge's score counts beside the other reward's."""
    judge_requests: int = setting(16, resume=True)
    """Requests to the judge at the same time."""
    judge_rate: float = setting(0.0, resume=True)
    """Requests to the judge per minute at most, of each worker; 0 is without a limit."""
    judge_timeout: float = setting(60.0, resume=True)
    """Seconds that the judge has for one answer, each of six times."""
    judge_failures: float = setting(0.2, resume=True)
    """The share of a generation's answers that may stay without a grade; beyond it the run ends, to be resumed."""

    def judge_problems(self) -> list[str]:
        """What is wrong with these settings, one sentence each; the rest is found when the reward is made.

        No part of ``problems``: what a run's directory says is read without the URL, if it is not this user's own.
        """
        if self.judge_url is None:
            names = ("judge_model", "judge_prompt", "judge_reference")
            flags = ", ".join("--" + name.replace("_", "-") for name in names if getattr(self, name) is not None)
            return [f"{flags} without --judge-url http://host:port/v1, which says where the judge is"] if flags else []
        found = []
        if not (self.judge_model or "").strip():
            found.append("--judge-url needs --judge-model, the server's name of the judge (GET /v1/models lists them)")
        if not math.isfinite(self.judge_weight) or self.judge_weight == 0:
            found.append(f"judge_weight (={self.judge_weight}) must be a finite number other than 0")
        return found


def judge_of(options: JudgeOptions) -> JudgeReward | None:
    """The judge that the options name; ``None`` if they name none.

    Raises:
        ConfigError: one option needs another.
        RewardError: they cannot work, or the file with the criteria cannot be read.
        MissingExtraError: httpx or tenacity is not installed.
    """
    problems = options.judge_problems()
    if problems:
        raise ConfigError.from_problems("the judge", problems)
    if options.judge_url is None:
        return None
    from eggroll.llm.rewards import JudgeReward

    low, high = options.judge_scale
    return JudgeReward(
        options.judge_url, options.judge_model or "", criteria_file=options.judge_prompt, low=low, high=high,
        reference=options.judge_reference, at_once=options.judge_requests, rate=options.judge_rate,
        timeout=options.judge_timeout, most_unscored=options.judge_failures,
    )  # fmt: skip


def reward_of(options: Any) -> Any:
    """What scores a run, for :func:`eggroll.llm.rewards.as_reward`: ``--reward`` or ``--task``, a judge, or both.

    Raises:
        ConfigError, RewardError, MissingExtraError: as :func:`judge_of`.
    """
    named, judge = options.reward or options.task, judge_of(options)
    if judge is None:
        return named or "perplexity"
    if named is None and options.judge_weight == 1:
        return judge
    return [(judge, options.judge_weight), *([(named, 1.0)] if named else [])]


def criteria_fingerprint(options: JudgeOptions) -> dict[str, str]:
    """A digest of the criteria, so that a resumed run is told if they have changed; empty without a file of them."""
    if options.judge_url is None or options.judge_prompt is None:
        return {}
    text = Path(options.judge_prompt).expanduser().read_bytes()
    return {"judge_prompt_fingerprint": hashlib.blake2b(text, digest_size=16).hexdigest()}


def unscored_line(generations: Iterable[Mapping[str, Any]]) -> str | None:
    """What is to be said at the end of a run about answers without a score; ``None`` if all had one.

    Args:
        generations: the metrics of the run's generations.
    """
    lines = [line for line in generations if line.get("scores")]
    of_all = sum(line["scores"] for line in lines)
    without = sum(line["scores"] * line.get("unscored_share", 0.0) for line in lines)
    if not without:
        return None
    return (
        f"{100 * without / of_all:.2g} % of the answers could not be scored (the judge gave no grade that can "
        "be used); each counted as the mean of its prompt's others. metrics.jsonl has the share of each generation"
    )
