"""What a reward is: a name, what it needs to see, and one method that fits that need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from eggroll.errors import EggrollError, RewardError

Need = Literal["text", "tokens", "model", "mixed"]
"""``text``: generated completions. ``tokens``: the likelihood of given texts. ``model``: the model itself, one member
at a time. ``mixed``: a mixture of several, see :attr:`Reward.parts`."""

Prompt = str | list[dict[str, Any]]


class Unscored(float):
    """The type of :data:`UNSCORED`."""

    __slots__ = ()


UNSCORED = Unscored("nan")
"""The score of an answer that could not be judged, through no fault of its own: a judge did not reply.

It says nothing about the answer, so it must not move the model. The answer counts as the mean of all scored answers to
its prompt, other members' included, which gives it a weight of about 0 in the estimate; a prompt without any scored
answer counts the same for all. NaN and ``None``, by contrast, are the worst score there is."""


class Reward:
    """Base of all rewards; higher is better. A subclass implements the method that belongs to what it needs."""

    needs: Need = "text"
    name: str = "reward"
    can_fail: bool = False
    """Whether it asks something that may not reply, so that the log says how often that was."""
    most_unscored: float = 0.2
    """The share of a generation's answers that may be :data:`UNSCORED`; beyond it the run ends, before the update."""

    @property
    def parts(self) -> list[tuple[Reward, float]]:
        """The rewards that this one is a weighted sum of; a simple reward is its own only part."""
        return [(self, 1.0)]

    @property
    def notes(self) -> list[str]:
        """What has to be said at the start of a run, one line each."""
        return [note for part, _ in self.parts if part is not self for note in part.notes]

    @property
    def reads(self) -> Literal["text", "prompts", "worlds"]:
        """What its data are: texts whose likelihood counts, prompts to answer, or rows that worlds begin with."""
        if any(hasattr(part, "world") for part, _ in self.parts):
            return "worlds"
        return "text" if all(part.needs == "tokens" for part, _ in self.parts) else "prompts"

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> list[float]:
        """Rewards that need text: one score per completion.

        Args:
            prompts: what was asked, one per completion.
            completions: what the model answered, without the prompt.
            columns: further columns of the data set, one value per completion.

        Raises:
            RewardError: the reward raised, or returned something else than one number per completion.
        """
        raise self._wrong_use("score")

    def log_likelihood(
        self,
        model: torch.nn.Module,
        input_ids: Any,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **inputs: Any,
    ) -> torch.Tensor:
        """Rewards that need tokens: the mean log-likelihood per token of each row, ``(rows,)`` float32."""
        raise self._wrong_use("log_likelihood")

    def evaluate(self, model: torch.nn.Module, inputs: Any) -> float:
        """Rewards that need the model: one number for the model on a batch of inputs."""
        raise self._wrong_use("evaluate")

    def _wrong_use(self, method: str) -> RewardError:
        right = {"text": "score", "tokens": "log_likelihood", "model": "evaluate", "mixed": "parts"}[self.needs]
        return RewardError(f"reward {self.name!r} needs {self.needs!r} and has no {method}; use {right}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def as_score(value: Any, what: str) -> float:
    """A single score as a float; ``None`` is NaN (the worst score of a generation).

    Raises:
        RewardError: it is not a number. ``what`` opens the message.
    """
    if value is None:
        return math.nan
    if isinstance(value, Unscored):
        return value
    if isinstance(value, str | bytes):
        raise RewardError(f"{what} returned the text {value!r}; a score must be a number")
    try:
        if isinstance(value, torch.Tensor):
            return float(value.detach())
        if isinstance(value, np.ndarray):
            return float(value.item())  # an array of one number is a number, as in torch
        return float(value)
    except OverflowError as error:
        raise RewardError(f"{what} returned a number that is too large for a float; a score must fit one") from error
    except Exception as error:  # whatever a class of the user's raises
        raise RewardError(f"{what} returned {describe(value)}; a score must be a number") from error


def as_scores(values: Any, count: int, what: str) -> list[float | None]:
    """A reward's list of scores, checked; ``None`` stays ``None``.

    Raises:
        RewardError: not one number per completion.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().flatten().tolist()
    elif isinstance(values, np.ndarray):
        values = values.ravel().tolist()
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise RewardError(f"{what} returned {describe(values)}; it must return a list of {count} numbers")
    with guarded(what):  # a generator runs only now
        found = list(values)
    if len(found) != count:
        raise RewardError(f"{what} returned {len(found)} scores for {count} completions; it must return one for each")
    return [None if value is None else as_score(value, what) for value in found]


@contextmanager
def guarded(what: str, after: str = "") -> Iterator[None]:
    """Makes whatever the user's code in the block raises an error about the reward, ``sys.exit()`` and ``quit()`` too.

    Args:
        what: opens the message.
        after: ends it.

    Raises:
        RewardError: the block raised. Errors of eggroll's own and Ctrl-C pass as they are.
    """
    try:
        yield
    except (EggrollError, KeyboardInterrupt):
        raise
    except SystemExit as error:
        said = "" if error.code is None else f" ({error.code})"
        raise RewardError(
            f"{what} ended the program with sys.exit(), exit() or quit(){said}; a reward must return a score{after}"
        ) from error
    except BaseException as error:
        raise RewardError(f"{what} raised {type(error).__name__}: {error}{after}") from error


def describe(value: Any) -> str:
    """A value for a message: its type and its beginning."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__} that cannot be shown"
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def shown(prompt: Any) -> str:
    """A prompt for a message."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) if prompt else ""
    return repr(text if len(text) <= 120 else text[:117] + "...")


def function_name(function: Any) -> str:
    """A name for a callable: its own, or its class's."""
    name = getattr(function, "__name__", None)
    return str(name) if name else type(function).__name__
