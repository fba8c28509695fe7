"""One vLLM engine writes for all members: all of a range and all prompts in one ``generate`` call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eggroll.core.threefry import fold_in, seed_key
from eggroll.errors import ConfigError
from eggroll.llm.backends.scoring import Evaluator
from eggroll.llm.backends.vllm_engine import VllmEngine
from eggroll.llm.backends.vllm_worker import MemberAddress
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.batches import Batch
from eggroll.llm.data.examples import Example
from eggroll.llm.generation.defaults import GenerationDefaults
from eggroll.llm.generation.generate import SAMPLING_STREAM
from eggroll.llm.rewards import Reward
from eggroll.loop import Evaluation


class VllmEvaluator(Evaluator):
    """Evaluates members, which are adapters of the engine, and the center by what they write.

    Args:
        engine: the engine.
        tokenizer: the model's tokenizer.
        reward: a reward of text.
        config: the run's settings.
        eos_ids: tokens that end a completion.
        defaults: what is applied of the model's generation config, as far as vLLM can.
    """

    def __init__(
        self,
        engine: VllmEngine,
        tokenizer: Any,
        reward: Reward,
        config: EggrollConfig,
        eos_ids: Sequence[int],
        defaults: GenerationDefaults | None = None,
    ) -> None:
        super().__init__(tokenizer, reward, config, eos_ids)
        self.engine = engine
        self.defaults = defaults or GenerationDefaults()
        self.best: MemberAddress | None = None
        """The member with the best score so far."""
        self._best_score = -np.inf

    def choose_mode(self, batch: Batch) -> str:
        """``lora``: there is only one way, and it takes prompts."""
        if isinstance(batch, dict):
            raise ConfigError("backend vllm takes prompts (strings or a data set), not tokenized batches")
        return "lora"

    def prepare(self, generation: int) -> None:
        """Let the engine's processes draw the generation's noise, if it is small enough to be kept."""
        self.engine.prepare(generation)

    def groups(self, members: range, batch: Batch) -> Iterator[range]:
        """All of them: the engine takes them in turns if it has to."""
        yield members

    @contextlib.contextmanager
    def perturbed(self, generation: int, members: range, sigma: float) -> Iterator[list[Any]]:
        """The adapter request of each member."""
        yield [self.engine.request(generation, member, sigma) for member in members]

    def center_prompts(self, batch: Sequence[Example]) -> int:
        """All of them."""
        return len(batch)

    def evaluate(self, generation: int, sigma: float, batch: Batch, members: range | None = None) -> Evaluation:
        """As for every backend; remembers who was best."""
        members = range(self.config.population_size) if members is None else members
        found = super().evaluate(generation, sigma, batch, members)
        scores = np.nan_to_num(found.fitness, nan=-np.inf).mean(axis=1)
        index = int(scores.argmax())
        if scores[index] > self._best_score:
            self._best_score = float(scores[index])
            self.best = MemberAddress(generation, members[index], sigma)
        return found

    def complete(
        self, batch: Sequence[Example], active: list[Any] | None, generation: int, members: range
    ) -> tuple[list[str], int]:
        """Completions of all rows by all members (or adapters), member by member, and how many tokens were made."""
        prompts = batch[:: self.config.samples_per_prompt]  # the engine takes the samples of a prompt by itself
        ids = self.encode(prompts).input_ids
        first, rows = members.start * len(prompts), len(members) * len(prompts)
        sampling = [self._sampling(generation, first + row) for row in range(rows)]
        requests = None if active is None else [request for request in active for _ in prompts]
        outputs = self.engine.generate(ids * len(members), sampling, requests)
        made = [_before_end(part.token_ids, self.eos_ids) for output in outputs for part in output.outputs]
        return self.tokenizer.batch_decode(made, skip_special_tokens=True), sum(map(len, made))

    def speaker(
        self, batch: Sequence[Example], active: list[Any] | None, generation: int, members: range
    ) -> EngineSpeaker:
        """Lets the rows of a batch hold conversations; the engine's prefix cache keeps what they have read."""
        return EngineSpeaker(self, active, generation, members.start * len(batch), len(batch))

    def sampling(self, generation: int, row: int, turn: int = 0) -> Any:
        """How a row's tokens are chosen, in a turn of its conversation; one completion each."""
        return self._sampling(generation, row, turn, samples=1)

    def _sampling(self, generation: int, row: int, turn: int = 0, samples: int | None = None) -> Any:
        from vllm import SamplingParams

        config = self.config
        seed = None
        if config.temperature > 0.0:
            key = fold_in(fold_in(fold_in(seed_key(config.seed), SAMPLING_STREAM), generation), row)
            key = fold_in(key, turn) if turn else key
            seed = int(key[1]) & 0x7FFFFFFF
        return SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            n=samples or config.samples_per_prompt,
            seed=seed,
            stop_token_ids=self.eos_ids,
            detokenize=False,
            **self.defaults.vllm_arguments(),
        )


class EngineSpeaker:
    """Lets rows say something, turn by turn: a :class:`~eggroll.llm.worlds.rollout.Speaker`.

    Args:
        evaluator: has the engine and the settings.
        active: the adapter request of each member; ``None`` for the center.
        generation: for sampled tokens.
        first: the number of the first row in its generation, for the same.
        prompts: rows of each member.
    """

    def __init__(
        self, evaluator: VllmEvaluator, active: list[Any] | None, generation: int, first: int, prompts: int
    ) -> None:
        self.evaluator, self.active, self.generation = evaluator, active, generation
        self.first, self.prompts = first, prompts

    def say(self, rows: Sequence[int], ids: Sequence[list[int]], turn: int) -> list[list[int]]:
        """See :class:`~eggroll.llm.worlds.rollout.Speaker`."""
        evaluator, active = self.evaluator, self.active
        sampling = [evaluator.sampling(self.generation, self.first + row, turn) for row in rows]
        requests = None if active is None else [active[row // self.prompts] for row in rows]
        outputs = evaluator.engine.generate([list(row) for row in ids], sampling, requests)
        return [_before_end(output.outputs[0].token_ids, evaluator.eos_ids) for output in outputs]


def _before_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the one that ended the completion, as the PyTorch evaluator counts them."""
    return list(ids[:-1] if len(ids) and ids[-1] in ends else ids)
