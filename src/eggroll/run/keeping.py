"""Which generation's weights a run leaves, and whether it still gets better: by its held-out scores.

Both are functions of the scores in ``metrics.jsonl``, so a resumed run knows them as an uninterrupted one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from eggroll.errors import ConfigError
from eggroll.run.console import number

if TYPE_CHECKING:
    from eggroll.run.run_dir import RunDir

Keep = Literal["best", "last"]
Score = tuple[int, float]
"""A generation (finished updates) and its held-out score."""


@dataclass
class Standing:
    """The held-out scores of a run so far, in the order of generations; that of generation 0 is from before training.

    Higher is better. Of equal scores the earlier one counts: it is the smaller change of the model.
    """

    scores: list[Score] = field(default_factory=list)

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Self:
        """From the lines of ``metrics.jsonl``."""
        found = cls()
        for line in lines:
            score = line.get("heldout_reward")
            if isinstance(score, int | float) and not isinstance(score, bool):
                found.add(line["generation"], float(score))
        return found

    def add(self, generation: int, score: float) -> None:
        """One more evaluation; a score that is no number is none, and a generation counts once."""
        if math.isfinite(score) and (not self.scores or generation > self.scores[-1][0]):
            self.scores.append((generation, score))

    @property
    def best(self) -> Score | None:
        """The best trained generation. The start is none: its weights are those that the user has already."""
        return _first_best([score for score in self.scores if score[0] > 0])

    @property
    def last(self) -> Score | None:
        """The last trained generation that has a score."""
        return self.scores[-1] if self.scores and self.scores[-1][0] > 0 else None

    @property
    def start(self) -> float | None:
        """The score from before training."""
        return self.scores[0][1] if self.scores and self.scores[0][0] == 0 else None

    @property
    def waited(self) -> list[Score]:
        """The evaluations in a row, up to the last one, that did not beat all before them, the start's included."""
        best = _first_best(self.scores)
        return [] if best is None else self.scores[self.scores.index(best) + 1 :]

    def is_over(self, patience: int) -> bool:
        """Whether ``patience`` evaluations in a row did not beat the best; 0 waits for ever."""
        return patience > 0 and len(self.waited) >= patience

    def why_over(self) -> str:
        """In words, why patience is at an end."""
        waited, best = self.waited, _first_best(self.scores)
        assert best is not None, "patience ends after evaluations"
        what = "score from before training" if best[0] == 0 else f"best score, that of generation {best[0]}"
        shown = ", ".join(number(score) for _, score in waited[-5:])
        some = "the last evaluation on held-out data" if len(waited) == 1 else f"{len(waited)} evaluations in a row"
        return (
            f"stopped early after generation {waited[-1][0]}: {some} ({'..., ' * (len(waited) > 5)}{shown}) did not "
            f"beat the {what} ({number(best[1])})"
        )


def _first_best(scores: list[Score]) -> Score | None:
    return max(scores, key=lambda one: one[1]) if scores else None  # max() takes the first of equals


@dataclass(frozen=True)
class Kept:
    """What a run leaves.

    Attributes:
        saved: whether the weights are those of the best held-out score, or of the last generation.
        generation: the updates that they hold.
        generations: updates done.
        standing: the held-out scores.
        stopped_early: whether patience ended the run.
    """

    saved: Keep
    generation: int
    generations: int
    standing: Standing
    stopped_early: bool = False

    @classmethod
    def last(cls, generations: int, standing: Standing | None = None, *, stopped_early: bool = False) -> Self:
        """The weights after all updates."""
        return cls("last", generations, generations, standing or Standing(), stopped_early)

    @property
    def score(self) -> float | None:
        """The held-out score of what is left; ``None`` if it has none."""
        return dict(self.standing.scores).get(self.generation)

    def sentence(self) -> str:
        """``best 0.8100 at generation 30, last 0.7900 at 50; saved: best``; empty without held-out scores."""
        best, last = self.standing.best, self.standing.last
        if best is None or last is None:
            return ""
        unscored = "" if last[0] == self.generations else f", and generation {self.generations} has no score"
        if best[0] == last[0]:
            what = "best" if unscored else "best and last"
            scores = f"{what} {number(best[1])} at generation {best[0]}{unscored}"
        else:
            scores = f"best {number(best[1])} at generation {best[0]}, last {number(last[1])} at {last[0]}{unscored}"
        return f"{scores}; saved: {self.saved}"

    def result(self, interrupted: bool = False) -> dict[str, Any]:
        """Entries of ``result.json``; empty without held-out scores."""
        best, last = self.standing.best, self.standing.last
        if best is None or last is None:
            return {}
        return {
            "generations": self.generations,
            "saved": self.saved,
            "saved_generation": self.generation,
            "best_heldout_reward": best[1],
            "best_generation": best[0],
            "last_heldout_reward": last[1],
            "last_generation": last[0],
            **({"stopped_early": True} if self.stopped_early else {}),
            **({"interrupted": True} if interrupted else {}),
        }

    def about(self) -> dict[str, Any]:
        """What the saved model's card says."""
        start, score, text = self.standing.start, self.score, self.sentence()
        return {
            "generations": self.generation,
            **({"heldout_before": start} if start is not None and score is not None else {}),
            **({"heldout_after": score} if score is not None else {}),
            **({"kept": text} if text else {}),
        }


def check_patience(patience: Any, *, heldout: bool, eval_every: int) -> None:
    """Refuse a patience that counts nothing.

    Args:
        patience: evaluations in a row without a better score; 0 is none.
        heldout: whether there are held-out data.
        eval_every: generations between evaluations.

    Raises:
        ConfigError: it is no whole number, or there is nothing to count.
    """
    if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
        raise ConfigError(f"patience (={patience!r}) must be a whole number of at least 0; 0 runs to the end")
    if patience and not (heldout and eval_every):
        what = "eval_every is 0" if heldout else "there are no held-out data (--eval-prompts, eval_data)"
        raise ConfigError(
            f"patience (={patience}) counts evaluations on held-out data, and {what}: give them, or leave it out"
        )


def check_keep(keep: Any, *, heldout: bool, run: RunDir | None) -> None:
    """Refuse to keep the best weights without what tells them or what holds them.

    Raises:
        ConfigError: ``keep`` is no such word; or it is ``best`` without held-out data, or without a run directory.
    """
    if keep not in get_args(Keep):
        raise ConfigError(f"keep (={keep!r}) must be one of: {', '.join(get_args(Keep))}")
    if keep == "best" and not heldout:
        raise ConfigError("keep='best' goes by the score on held-out data, and there are none: give eval_data")
    if keep == "best" and run is None:
        raise ConfigError(
            "keep='best' keeps the best generation in a checkpoint, which needs a run directory: give "
            "run=RunDir.create(path, config.to_dict())"
        )


RESULT_KEYS = frozenset(
    {"saved", "saved_generation", "best_heldout_reward", "best_generation", "last_heldout_reward", "last_generation"}
    | {"stopped_early", "interrupted"}
)
"""The entries of :meth:`Kept.result` that :meth:`Kept.sentence` says in words."""


def kept_sentence(result: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> str:
    """:meth:`Kept.sentence` of what is in ``result.json``; empty where it is not known."""
    saved, generation, done = (result.get(key) for key in ("saved", "saved_generation", "generations"))
    if saved not in ("best", "last") or type(generation) is not int or type(done) is not int:
        return ""
    until = Standing.of(line for line in lines if line["generation"] <= done)
    return Kept("best" if saved == "best" else "last", generation, done, until).sentence()
