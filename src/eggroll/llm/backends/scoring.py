"""From what members write to their scores: what the evaluators of all backends share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eggroll.distributed.host import check_taken_back
from eggroll.errors import RewardError
from eggroll.llm.backends.passes import fill_unscored, reduce_samples
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.batches import Batch
from eggroll.llm.data.examples import Example, columns_of, prompts_of
from eggroll.llm.estimate.expect import announce_if_slow
from eggroll.llm.generation.chat import plain_text
from eggroll.llm.generation.defaults import GenerationDefaults
from eggroll.llm.generation.encode import Encoded, encode_prompts
from eggroll.llm.rewards import FunctionReward, Reward
from eggroll.llm.rewards.base import Unscored, as_scores, guarded
from eggroll.llm.rewards.event_loop import finished
from eggroll.llm.rewards.notes import Notes, noting, with_extra
from eggroll.llm.worlds.rollout import Speaker
from eggroll.llm.worlds.scoring import Scores, Worlds
from eggroll.loop import Evaluation, Heldout

LOGGED, HELDOUT_LOGGED = "rewards/", "heldout_rewards/"
"""What a reward logs as NAME is in the metrics as ``rewards/NAME``, and that of the held-out data apart from it."""
UNSCORED_SHARE = "unscored_share"
"""The metric that says which part of a generation's answers had no score; logged if some could be without."""
HELDOUT_MEMBER = -1
"""The center in the place of a member in ``samples.jsonl``."""


class Evaluator(ABC):
    """Scores members and the center on a batch. A backend says how they write (:meth:`complete`).

    Args:
        tokenizer: the model's tokenizer.
        reward: what is scored.
        config: the run's settings.
        eos_ids: tokens that end a completion.
    """

    defaults = GenerationDefaults()
    """What is applied of the model's generation config, and what the run's settings take the place of."""
    encoder_decoder = False
    """Whether an encoder reads the prompts, and a decoder begins to write from nothing."""

    def __init__(self, tokenizer: Any, reward: Reward, config: EggrollConfig, eos_ids: Sequence[int]) -> None:
        self.tokenizer, self.reward, self.config, self.eos_ids = tokenizer, reward, config, list(eos_ids)
        self.worlds = Worlds.of(reward, tokenizer, config, self.eos_ids)
        self.note = ""
        self._timed = False

    # -- what a backend does

    @abstractmethod
    def choose_mode(self, batch: Batch) -> str:
        """How members are evaluated, settled on the first batch of a run. ``note`` says why it is a slow way."""

    @abstractmethod
    def prepare(self, generation: int) -> None:
        """Draw the generation's noise, if it is small enough to be kept."""

    @abstractmethod
    def groups(self, members: range, batch: Batch) -> Iterator[range]:
        """Members that are evaluated together, in order."""

    @abstractmethod
    def perturbed(self, generation: int, members: range, sigma: float) -> AbstractContextManager[Any]:
        """Makes the members ready for the length of a block; what it gives is handed to :meth:`complete`."""

    @abstractmethod
    def complete(self, batch: Sequence[Example], active: Any, generation: int, members: range) -> tuple[list[str], int]:
        """Completions of all rows of a batch by all members, member by member, and how many tokens were made.

        A prompt's samples are consecutive rows of the batch. Without ``active`` it is the center that writes.
        """

    @abstractmethod
    def speaker(self, batch: Sequence[Example], active: Any, generation: int, members: range) -> Speaker:
        """Lets the rows of a batch hold conversations: what :meth:`complete` is for one completion."""

    @abstractmethod
    def center_prompts(self, batch: Sequence[Example]) -> int:
        """Held-out prompts that the center answers together."""

    def expectation(self, batch: Batch) -> str:
        """A line about what a generation takes; empty where it is not known."""
        return ""

    def beyond_text(self, part: Reward, batch: Batch, active: Any, members: int) -> tuple[NDArray[np.float64], int]:
        """Scores by a reward that reads more than text, and tokens processed."""
        raise AssertionError(f"{type(self).__name__} has text only; reward {part.name!r} was to be refused before")

    # -- what all share

    @torch.no_grad()
    def evaluate(self, generation: int, sigma: float, batch: Batch, members: range | None = None) -> Evaluation:
        """Scores of members (all by default) on a batch: ``(N, prompts)``, or ``(N, 1)`` for rewards of the model."""
        members = range(self.config.population_size) if members is None else members
        batch = self._repeated(batch)
        start = time.perf_counter()
        self.prepare(generation)
        drawn = time.perf_counter() - start
        tables, missing, samples, tokens = [], [], [], 0
        with noting(generation, self.config.generations) as notes:
            for group in self.groups(members, batch):
                check_taken_back()
                began = time.perf_counter()
                with self.perturbed(generation, group, sigma) as active:
                    scores = self._score(batch, active, generation, group, notes)
                if not self._timed and len(members) == self.config.population_size:
                    self._timed = True
                    spent = time.perf_counter() - began
                    announce_if_slow(spent, len(group), len(members), self.config.generations)
                table = scores.values.reshape(len(group), -1)
                tables.append(table)
                missing.append(scores.missing(len(group)))
                tokens += scores.tokens
                if isinstance(batch, Sequence) and scores.completions:
                    samples += self._samples(batch, group, table, scores, generation)
        table, unscored = np.concatenate(tables), np.concatenate(missing)
        share = self._share_unscored(unscored, notes, "the generation")
        metrics = {"draw_s": drawn, **share, **notes.means(LOGGED), **self._world_metrics()}
        return Evaluation(self._reduced(self._filled(table, unscored)), metrics, tokens, samples)

    @torch.no_grad()
    def heldout(self, batch: Batch, generation: int = 0) -> Heldout:
        """Mean score of the center after ``generation`` updates, with its completions as samples."""
        with noting(generation, self.config.generations) as notes:
            if isinstance(batch, dict):
                reward = float(np.nanmean(self._score(batch, None, 0, range(1), notes).values))
                return Heldout(reward, metrics=notes.means(HELDOUT_LOGGED))
            together, times = self.center_prompts(batch), self.config.samples_per_prompt
            values, missing, samples = [], [], []
            for start in range(0, len(batch), together):
                part = batch[start : start + together]
                scores = self._score(self._repeated(part), None, 0, range(1), notes)
                table, without = scores.values.reshape(1, -1), scores.missing(1)
                reduced = self._reduced(table if times == 1 else self._filled(table, without))[0]
                values.append(reduced)
                missing.append(without)
                for row, (example, completion, value) in enumerate(
                    zip(part, scores.completions[::times], reduced, strict=False)
                ):
                    prompt = example.prompt if scores.prompts is None else scores.prompts[row * times]
                    sample = _sample(HELDOUT_MEMBER, prompt, completion, value, "heldout")
                    samples.append(with_extra(sample, scores.extra, row * times))
        self._share_unscored(np.concatenate(missing, axis=1), notes, "the held-out data")
        table = np.concatenate(values)
        finite = table[np.isfinite(table)]
        mean = float(finite.mean()) if finite.size else float("nan")
        found = {f"heldout_{name}": value for name, value in self._world_metrics().items()}
        return Heldout(mean, samples, {**notes.means(HELDOUT_LOGGED), **found})

    @torch.no_grad()
    def center_scores(self, batch: Sequence[Example], number: int) -> Scores:
        """What the center writes to some prompts, with its scores; ``number`` takes the place of a generation."""
        with noting(0, 0) as notes:
            return self._score(batch, None, number, range(1), notes)

    def encode(self, batch: Sequence[Example]) -> Encoded:
        """Prompts as token ids, the same for every backend."""
        config = self.config
        return encode_prompts(
            self.tokenizer,
            prompts_of(batch),
            config.max_length,
            chat=config.chat,
            system=config.system,
            columns=[example.columns for example in batch],
            ends=self.eos_ids,
            encoder=self.encoder_decoder,
        )

    def needs(self, kind: str) -> bool:
        """Whether a part of the reward needs ``text``, ``tokens`` or the ``model``."""
        return any(part.needs == kind for part, _ in self.reward.parts)

    def _score(self, batch: Batch, active: Any, generation: int, members: range, notes: Notes) -> Scores:
        """Weighted scores of ``len(members)`` members (or the center) on a batch, member by member."""
        total: NDArray[np.float64] | float = 0.0
        completions: Sequence[Any] = []
        parts: dict[str, list[float]] = {}
        unscored: NDArray[np.bool_] | None = None
        tokens, talk = 0, None
        if self.needs("text"):
            if isinstance(batch, dict):
                batch = _examples_of(batch, self.tokenizer)
            if self.worlds is None:
                completions, tokens = self.complete(batch, active, generation, members)
            else:
                speaker = self.speaker(batch, active, generation, members)
                talk = self.worlds.hold(batch, speaker, len(members))
                tokens = talk.tokens
        for part, weight in self.reward.parts:
            if part.needs == "text":
                assert not isinstance(batch, dict)
                if talk is None:
                    prompts, texts = prompts_of(batch) * len(members), completions
                    columns = {key: values * len(members) for key, values in columns_of(batch).items()}
                else:  # only TRL's functions know completions of several messages
                    prompts, columns = talk.prompts, talk.columns
                    texts = talk.completions if isinstance(part, FunctionReward) else talk.texts
                with guarded(f"reward {part.name!r}"):  # also of a class of the user's own
                    found = finished(part.score(prompts, texts, columns)) if texts else []
                checked = as_scores(found, len(texts), f"reward {part.name!r}")
                values = np.asarray(checked, dtype=np.float64)
                without = np.array([isinstance(value, Unscored) for value in checked], dtype=np.bool_)
                unscored = without if unscored is None else unscored | without
            else:
                values, used = self.beyond_text(part, batch, active, len(members))
                tokens += used
            total = total + weight * values
            if len(self.reward.parts) > 1 and np.size(values) == (len(completions) if talk is None else talk.kept):
                parts[part.name] = np.ravel(values).tolist()
        extra = {**parts, **notes.take_extra()}
        if talk is None or self.worlds is None:
            return Scores(np.asarray(total), completions, tokens, extra, unscored=unscored)
        return self.worlds.scores(np.asarray(total), talk, extra, unscored)

    def _world_metrics(self) -> dict[str, float]:
        return {} if self.worlds is None else self.worlds.take_counts()

    def _repeated(self, batch: Batch) -> Batch:
        """Each prompt as often as it is sampled, one after the other."""
        times = self.config.samples_per_prompt
        if times == 1 or isinstance(batch, dict) or not self.needs("text"):
            return batch
        return [example for example in batch for _ in range(times)]

    def _filled(self, table: NDArray[np.float64], unscored: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Scores of samples ``(members, prompts * samples)`` with something neutral in the place of unscored ones."""
        times = self.config.samples_per_prompt
        if not self.needs("text") or table.shape[1] % times:
            times = 1
        shape = (len(table), -1, times)
        return fill_unscored(table.reshape(shape), unscored.reshape(shape)).reshape(table.shape)

    def _share_unscored(self, unscored: NDArray[np.bool_], notes: Notes, what: str) -> dict[str, float]:
        """The share of answers without a score, for the log; empty if there are none, and no part can fail.

        Raises:
            RewardError: it is larger than the reward allows.
        """
        count = int(unscored.sum())
        if not count and not any(part.can_fail for part, _ in self.reward.parts):
            return {}
        share, most = count / unscored.size, min(part.most_unscored for part, _ in self.reward.parts)
        if share > most:
            reasons = Counter(notes.reasons).most_common(1)
            why = f"; most often: {reasons[0][0]}" if reasons else ""
            raise RewardError(
                f"{count} of {unscored.size} answers of {what} could not be scored by {self.reward.name!r}, more than "
                f"the {most:.0%} that are allowed{why}. Nothing was learned from them, and what was done before is "
                "kept: mend the cause, then go on (--resume)"
            )
        return {UNSCORED_SHARE: share}

    def _reduced(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of samples ``(members, prompts * samples)`` as scores of prompts."""
        times = self.config.samples_per_prompt
        if times == 1 or not self.needs("text") or table.shape[1] % times:
            return table
        return reduce_samples(table.reshape(len(table), -1, times), self.config.pass_at)

    def _samples(
        self, batch: Sequence[Example], members: range, table: NDArray[Any], scores: Scores, generation: int
    ) -> list[dict[str, Any]]:
        """One completion of each of the first members, of another row in each generation."""
        index = generation % len(batch)
        chosen = [(row, m) for row, m in enumerate(members) if m < self.config.samples_per_generation]
        found = []
        for row, member in chosen:
            place = row * len(batch) + index
            prompt = batch[index].prompt if scores.prompts is None else scores.prompts[place]
            sample = _sample(member, prompt, scores.completions[place], table[row, index], "train")
            found.append(with_extra(sample, scores.extra, place))
        return found


def _sample(member: int, prompt: Any, completion: Any, score: float, split: str) -> dict[str, Any]:
    """A row of ``samples.jsonl``."""
    return {
        "member": member,
        "prompt": plain_text(prompt or ""),
        "completion": completion,
        "reward": float(score),
        "split": split,
    }


def _examples_of(batch: dict[str, Any], tokenizer: Any) -> list[Example]:
    """Prompts of a tokenized batch, for rewards that read text."""
    return [Example(text) for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]


def eos_ids(*sources: Any) -> list[int]:
    """The tokens that end a completion, after a generation config, a model's config and a tokenizer."""
    found: list[int] = []
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found += list(value) if isinstance(value, list | tuple) else [value]
    return sorted(set(found))
