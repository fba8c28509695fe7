"""A model's answers to a task's test problems, and what they score: before, after, and the difference.

With several answers to each problem, pass@k is the chance that at least one of k is right: 1 - C(n-c, k) / C(n, k) for
c right ones of n, the unbiased estimate of Chen et al. 2021 (arXiv:2107.03374, equation 1), averaged over problems.
pass@1 is the accuracy. An answer is right if it scores at least ``SOLVED``, also where scores are graded.

Answers are made and scored as a run makes and scores those to its held-out prompts, so the figures are comparable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eggroll.errors import ConfigError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.batches import batches
from eggroll.llm.data.examples import Example, load_examples
from eggroll.llm.measure.answers import Writer
from eggroll.llm.measure.intervals import Interval, mcnemar, mean_interval, paired_proportions, wilson
from eggroll.llm.models.loading import LoadedModel
from eggroll.llm.rewards import FunctionReward, Reward
from eggroll.llm.tasks import SOLVED, Task
from eggroll.llm.worlds.reward import WorldReward

__all__ = ["Comparison", "Result", "compare", "draw_problems", "evaluate", "ks_of", "pass_at", "solved"]

DEFAULT_PROBLEMS = 128
Listener = Callable[["Result"], None]


@dataclass
class Result:
    """The answers of one model, problem by problem in their order; while it answers, the first of them.

    ``samples`` is how many answers there are to each problem.
    """

    scores: list[float] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    samples: int = 1

    @property
    def right(self) -> int:
        """Answers that are right."""
        return int(np.sum(solved(self.scores)))

    @property
    def problems(self) -> int:
        """Problems that are answered."""
        return len(self.scores) // self.samples

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many answers to each problem are right ``(problems,)``."""
        return solved(self.scores).reshape(-1, self.samples).sum(axis=1)

    @property
    def means(self) -> NDArray[np.float64]:
        """The mean score of each problem's answers ``(problems,)``."""
        return np.asarray(self.scores, dtype=np.float64).reshape(-1, self.samples).mean(axis=1)

    def accuracy(self, *, seed: int = 0) -> Interval:
        """The part of the answers that are right; answers to one problem are no independent draws."""
        return self.pass_at(1, seed=seed)

    def pass_at(self, k: int, *, seed: int = 0) -> Interval:
        """The chance that at least one of ``k`` answers is right, over problems.

        Args:
            k: from 1 to ``samples``.
            seed: of the resampling; problems are what is drawn again.
        """
        found = pass_at(self.counts, self.samples, k)
        if _is_zero_one(found):
            return wilson(int(found.sum()), len(found))
        return mean_interval(found, 0.0, 1.0, seed=seed)

    def mean(self, task: Task, *, seed: int) -> Interval:
        """The mean score. Where scores are 0 and 1 only, it is a proportion and has a proportion's interval."""
        if task.best == 1.0 and set(self.scores) <= {0.0, 1.0}:
            return self.accuracy(seed=seed)
        return mean_interval(self.means, 0.0, task.best, seed=seed)


@dataclass(frozen=True)
class Comparison:
    """What changed between two models on the same problems: after minus before.

    Attributes:
        accuracy: difference of the parts that are right, between -1 and 1.
        mean: difference of the mean scores.
        gained: problems that only the second model got right, or, of several answers to each, more of them.
        lost: problems that only the first model got right, or more of its answers.
        p_value: McNemar's exact test (for several answers: the sign test) of whether gains and losses are equally
            likely.
        passes: difference of pass@k, by k.
    """

    accuracy: Interval
    mean: Interval
    gained: int
    lost: int
    p_value: float
    passes: dict[int, Interval] = field(default_factory=dict)


def draw_problems(task: Task, count: int | None, seed: int) -> list[Example]:
    """``count`` of the task's test problems (``None``: 128 or all), chosen and ordered by ``seed``.

    Raises:
        ConfigError: there are fewer.
    """
    rows = task.test or task.heldout
    count = min(DEFAULT_PROBLEMS, len(rows)) if count is None else count
    if not 1 <= count <= len(rows):
        raise ConfigError(f"problems (={count}) must be from 1 to {len(rows)}, the test problems of {task.name}")
    return batches(load_examples(rows), count, 0, seed)


def evaluate(
    loaded: LoadedModel,
    task: Task,
    problems: Sequence[Example],
    config: EggrollConfig,
    *,
    samples: int = 1,
    batch_size: int = 16,
    listener: Listener | None = None,
) -> Result:
    """Let a model answer problems and score the answers.

    Args:
        loaded: the model and its tokenizer.
        task: gives the reward.
        problems: rows of the task.
        config: ``max_tokens``, ``max_length``, ``temperature``, ``system`` and ``seed`` are used. Sampled answers
            (temperature above 0) depend on the seed and on ``batch_size``, greedy ones on neither.
        samples: answers to each problem, each sampled by itself.
        batch_size: answers made together.
        listener: called after each batch with what there is by then.

    Raises:
        RewardError: the reward fails.
    """
    reward: Reward = FunctionReward(task.reward, tokenizer=loaded.tokenizer, name=task.name)
    if task.world is not None:
        reward = WorldReward(task.world, name=task.name)
    writer = Writer(loaded, config, reward)
    result, start = Result(samples=samples), time.perf_counter()
    rows = [problem for problem in problems for _ in range(samples)]
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        scores = writer.scores(batch, first)
        result.scores += scores.values.tolist()
        result.completions += scores.completions
        result.tokens += scores.tokens
        result.seconds = time.perf_counter() - start
        if listener is not None:
            listener(result)
    return result


def compare(before: Result, after: Result, task: Task, *, seed: int) -> Comparison:
    """The paired difference of two models' answers to the same problems, as many to each."""
    one, two = before.counts, after.counts
    gained, lost = int(np.sum(two > one)), int(np.sum(one > two))
    passes = {k: _difference(before, after, k, seed) for k in ks_of(before.samples)}
    zero_one = task.best == 1.0 and {*before.scores, *after.scores} <= {0.0, 1.0}
    differences = after.means - before.means
    mean = passes[1] if zero_one else mean_interval(differences, -task.best, task.best, seed=seed)
    return Comparison(passes[1], mean, gained, lost, mcnemar(gained, lost), passes)


def ks_of(samples: int) -> list[int]:
    """The k of pass@k that are told: 1, 2, 4, ... and the number of samples."""
    return sorted({1, samples, *(2**power for power in range(samples.bit_length()) if 2**power <= samples)})


def pass_at(counts: NDArray[np.int64], samples: int, k: int) -> NDArray[np.float64]:
    """The unbiased estimate of pass@k for each problem ``(n,)``.

    Args:
        counts: right answers to each ``(n,)``.
        samples: answers to each.
        k: from 1 to ``samples``.

    Raises:
        ConfigError: ``k`` is not.
    """
    if not 1 <= k <= samples:
        raise ConfigError(f"k (={k}) of pass@k must be from 1 to {samples}, the answers to each problem")
    every = comb(samples, k)
    return np.array([1.0 - comb(samples - int(count), k) / every for count in counts], dtype=np.float64)


def _difference(before: Result, after: Result, k: int, seed: int) -> Interval:
    """The paired difference of pass@k."""
    one, two = (pass_at(result.counts, result.samples, k) for result in (before, after))
    if _is_zero_one(one) and _is_zero_one(two):
        return paired_proportions(one == 1.0, two == 1.0)
    return mean_interval(two - one, -1.0, 1.0, seed=seed)


def _is_zero_one(values: NDArray[np.float64]) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def solved(scores: Sequence[float]) -> NDArray[np.bool_]:
    """Which scores are those of right answers ``(n,)``."""
    return np.asarray(scores, dtype=np.float64) >= SOLVED - 1e-9
