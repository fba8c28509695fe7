"""Scores of all members by what one vLLM engine writes for them: all members and prompts in one ``generate`` call."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from eggroll.core.threefry import fold_in, seed_key
from eggroll.errors import ConfigError
from eggroll.llm.backends.passes import reduce_samples
from eggroll.llm.backends.torch import HELDOUT_MEMBER
from eggroll.llm.backends.vllm_engine import VllmEngine
from eggroll.llm.backends.vllm_worker import MemberAddress
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, columns_of, prompts_of
from eggroll.llm.generation.chat import encode_prompts, format_prompts, plain_text
from eggroll.llm.generation.generate import SAMPLING_STREAM
from eggroll.llm.rewards import Reward
from eggroll.loop import Evaluation, Heldout


class VllmEvaluator:
    """Evaluates members and the centre by what they write; the counterpart of ``HFEvaluator``.

    Args:
        engine: the engine.
        tokenizer: the model's tokenizer.
        reward: a reward of text.
        config: the run's settings.
        eos_ids: tokens that end a completion.
    """

    mode_note = ""

    def __init__(
        self, engine: VllmEngine, tokenizer: Any, reward: Reward, config: EggrollConfig, eos_ids: Sequence[int]
    ) -> None:
        self.engine, self.tokenizer, self.reward, self.config = engine, tokenizer, reward, config
        self.eos_ids = list(eos_ids)
        self.best: MemberAddress | None = None
        self._best_score = -np.inf

    def choose_mode(self, batch: Any) -> str:
        """``lora``: there is only one way, and it takes prompts."""
        if isinstance(batch, dict):
            raise ConfigError("backend vllm takes prompts (strings or a data set), not tokenised batches")
        return "lora"

    def evaluate(
        self, generation: int, sigma: float, batch: Sequence[Example], members: range | None = None
    ) -> Evaluation:
        """Scores ``(members, prompts)`` of members on a batch, in one ``generate`` call."""
        members = range(self.config.population_size) if members is None else members
        start = time.perf_counter()
        self.engine.prepare(generation)
        drawn = time.perf_counter() - start
        requests = [self.engine.request(generation, member, sigma) for member in members for _ in batch]
        texts, tokens = self._complete(batch, len(members), generation, members.start, requests)
        table = self._score(batch, texts, len(members))
        self._note_best(generation, sigma, members, table)
        samples = [
            _sample(batch[generation % len(batch)], member, row, generation % len(batch), texts, len(batch), table)
            for row, member in enumerate(members)
            if member < self.config.samples_per_generation
        ]
        return Evaluation(table, {"draw_s": drawn}, tokens, samples)

    def _note_best(self, generation: int, sigma: float, members: range, table: np.ndarray) -> None:
        scores = np.nan_to_num(table, nan=-np.inf).mean(axis=1)
        index = int(scores.argmax())
        if scores[index] > self._best_score:
            self._best_score = float(scores[index])
            self.best = MemberAddress(generation, members[index], sigma)

    def evaluate_center(self, batch: Sequence[Example]) -> Heldout:
        """Mean score of the centre, with its completions as samples."""
        texts, _ = self._complete(batch, 1, 0, 0, None)
        table = self._score(batch, texts, 1)
        samples = [
            {**_sample(example, HELDOUT_MEMBER, 0, index, texts, len(batch), table), "split": "heldout"}
            for index, example in enumerate(batch)
        ]
        finite = table[np.isfinite(table)]
        return Heldout(float(finite.mean()) if finite.size else float("nan"), samples)

    def _complete(
        self, batch: Sequence[Example], members: int, generation: int, first: int, requests: Sequence[Any] | None
    ) -> tuple[list[list[str]], int]:
        """``members * prompts`` lists of completions, member by member, and how many tokens were made."""
        ids = self._encode(batch)
        sampling = [self._sampling(generation, first * len(batch) + row) for row in range(members * len(batch))]
        outputs = self.engine.generate(ids * members, sampling, requests)
        made = [[_before_end(part.token_ids, self.eos_ids) for part in output.outputs] for output in outputs]
        texts = [self.tokenizer.batch_decode(parts, skip_special_tokens=True) for parts in made]
        return texts, sum(len(part) for parts in made for part in parts)

    def _encode(self, batch: Sequence[Example]) -> list[list[int]]:
        config = self.config
        texts = format_prompts(self.tokenizer, prompts_of(batch), chat=config.chat, system=config.system)
        encoded = encode_prompts(self.tokenizer, texts, config.max_length)
        return [list(ids) for ids in encoded.input_ids]

    def _sampling(self, generation: int, row: int) -> Any:
        from vllm import SamplingParams

        config = self.config
        seed = None
        if config.temperature > 0.0:
            key = fold_in(fold_in(fold_in(seed_key(config.seed), SAMPLING_STREAM), generation), row)
            seed = int(key[1]) & 0x7FFFFFFF
        return SamplingParams(
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            n=config.samples_per_prompt,
            seed=seed,
            stop_token_ids=self.eos_ids,
            detokenize=False,
        )

    def _score(self, batch: Sequence[Example], texts: Sequence[Sequence[str]], members: int) -> np.ndarray:
        """Weighted scores ``(members, prompts)``, over a prompt's samples reduced as the settings say."""
        samples = self.config.samples_per_prompt
        flat = [text for parts in texts for text in parts]
        prompts = [prompt for prompt in prompts_of(batch) for _ in range(samples)] * members
        columns = {
            name: [value for value in values for _ in range(samples)] * members
            for name, values in columns_of(batch).items()
        }
        total = np.zeros(len(flat))
        for part, weight in self.reward.parts:
            total = total + weight * np.asarray(part.score(prompts, flat, columns), dtype=np.float64)
        return reduce_samples(total.reshape(members, len(batch), samples), self.config.pass_at)


def _sample(
    example: Example, member: int, row: int, index: int, texts: Sequence[Sequence[str]], width: int, table: np.ndarray
) -> dict[str, Any]:
    return {
        "member": member,
        "prompt": plain_text(example.prompt or ""),
        "completion": texts[row * width + index][0],
        "reward": float(table[row, index]),
        "split": "train",
    }


def _before_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Tokens up to the one that ended the completion, as the PyTorch evaluator counts them."""
    return list(ids[:-1] if len(ids) and ids[-1] in ends else ids)
