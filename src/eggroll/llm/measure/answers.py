"""A model's answers, made as a run makes those to its held-out prompts; nothing is scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from eggroll.llm.backends.torch import TorchEvaluator
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example
from eggroll.llm.generation.encode import encode_prompts
from eggroll.llm.models.loading import LoadedModel
from eggroll.llm.rewards import FunctionReward, Reward
from eggroll.llm.worlds.scoring import Scores
from eggroll.torch import Population

__all__ = ["Conversation", "Writer"]

Message = dict[str, Any]


class Writer:
    """Lets a model answer prompts.

    Args:
        loaded: the model and its tokenizer.
        config: ``max_tokens``, ``max_length``, ``temperature``, ``chat``, ``system`` and ``seed`` are used, and those
            of worlds.
        reward: for :meth:`scores`.
    """

    def __init__(self, loaded: LoadedModel, config: EggrollConfig, reward: Reward | None = None) -> None:
        self.tokenizer: Any = loaded.tokenizer
        self.config = dataclasses.replace(config, population_size=2, rank=1)
        population = Population(loaded.model, population_size=2, rank=1)  # its center is the model; no member is made
        reward = reward or FunctionReward(_unscored, tokenizer=loaded.tokenizer, name="none")
        self.evaluator = TorchEvaluator(population, loaded.tokenizer, reward, self.config)

    @torch.no_grad()
    def write(self, batch: Sequence[Example], number: int) -> tuple[list[str], int]:
        """Completions of some prompts, and how many tokens were made.

        Args:
            batch: prompts that are answered together.
            number: of the batch's first prompt. It takes the place of a generation, so that no two prompts get the same
                random numbers: sampled answers (temperature above 0) depend on it, greedy ones do not.

        Raises:
            DataError: the tokenizer's chat template refuses a prompt.
        """
        return self.evaluator.complete(batch, None, number, range(1))

    def scores(self, batch: Sequence[Example], number: int) -> Scores:
        """What the reward says of the answers to some prompts, or of the conversations that begin with them.

        Args:
            batch, number: see :meth:`write`.

        Raises:
            RewardError: the reward fails.
        """
        return self.evaluator.center_scores(batch, number)

    @property
    def converses(self) -> bool:
        """Whether questions go through a chat template, so that a conversation can go on."""
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        return has_template and self.config.chat is not False

    def length(self, prompt: str | list[Message]) -> int:
        """Tokens of a prompt, as the model reads it."""
        config = self.config
        encoded = encode_prompts(
            self.tokenizer, [prompt], 2**31, chat=config.chat, system=config.system,
            ends=self.evaluator.eos_ids, encoder=self.evaluator.encoder_decoder,
        )  # fmt: skip
        return encoded.longest


class Conversation:
    """Questions and answers in turn. Where the model has no chat template, each question stands alone.

    Args:
        writer: answers.
    """

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.turns: list[Message] = []

    def ask(self, question: str, number: int) -> str:
        """The answer to a question, which is a part of the conversation from then on.

        What does not fit ``max_length`` tokens is forgotten, the oldest question and its answer first.

        Args:
            question: what is asked.
            number: see :meth:`Writer.write`.
        """
        if not self.writer.converses:
            return self.writer.write([Example(question)], number)[0][0]
        turns = [*self.turns, {"role": "user", "content": question}]
        while len(turns) > 1 and self.writer.length(turns) > self.writer.config.max_length:
            turns = turns[2:]
        answer = self.writer.write([Example(turns)], number)[0][0]
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer


def _unscored(completions: Sequence[str], **_: Mapping[str, Any]) -> list[float]:
    return [0.0] * len(completions)
