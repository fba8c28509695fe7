"""The Hugging Face model itself is the population: members are rows of one batch, or come one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.errors import ModelError, UnsupportedOperationError
from eggroll.llm.backends.scoring import Evaluator, eos_ids
from eggroll.llm.backends.turns import RowSelection, TurnSpeaker
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.batches import Batch
from eggroll.llm.data.examples import Example
from eggroll.llm.estimate.expect import expectation
from eggroll.llm.estimate.machine import machine_memory, rows_budget
from eggroll.llm.estimate.memory import Estimate, Workload
from eggroll.llm.generation.chat import plain_text
from eggroll.llm.generation.defaults import GenerationDefaults
from eggroll.llm.generation.generate import Sampling, generate
from eggroll.llm.models.loading import embedding_rows
from eggroll.llm.models.outline import Outline, exclude_of, separate_head
from eggroll.llm.rewards import Reward
from eggroll.torch import Active, Population, Replica

MOST_CENTER_ROWS = 64
"""Held-out rows that the center is evaluated on together, at most."""
MESSAGE_TOKENS = 48
"""What a message of a world is taken to need in an estimate, with what the chat template writes around it."""


def replica_for(model: Any, config: EggrollConfig) -> Replica:
    """The replica that a run with these settings has: which parameters it evolves, and how they are updated."""
    exclude = exclude_of(config, separate_head(model))
    return Replica(model.eval(), dataclasses.replace(config, exclude=exclude), kinds=config.kinds)


class TorchEvaluator(Evaluator):
    """Evaluates members and the center of a population with any mixture of rewards.

    Every kind of parameter can be perturbed. ``members_per_forward`` members at a time are rows of one batch;
    if this model cannot be evaluated so (checked once, :meth:`choose_mode`), one after the other.

    Args:
        population: the members.
        tokenizer: the model's tokenizer.
        reward: what is scored.
        config: the run's settings.
    """

    def __init__(self, population: Population, tokenizer: Any, reward: Reward, config: EggrollConfig) -> None:
        self.population = population
        self.model: Any = population.model
        generation = getattr(self.model, "generation_config", None)
        ends = eos_ids(generation, self.model.config, tokenizer)
        super().__init__(tokenizer, reward, config, ends)
        self.defaults = GenerationDefaults.of(generation, config.temperature)
        self.encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        first = next(self.model.parameters())
        self.device = first.device
        self.estimate = Estimate(Outline.of(self.model), config, first.dtype, tuple(population.specs))
        self.vocabulary = embedding_rows(self.model)

    def choose_mode(self, batch: Batch) -> str:
        """Check on a small input that rows hold the members; otherwise settle on one member at a time.

        Returns the mode, ``rows`` or ``loop``; ``note`` says why it is the slow one.
        """
        if self.population.mode != "auto":
            return self.population.mode
        if all(part.needs == "model" for part, _ in self.reward.parts):
            self.population.mode = "loop"
            self.note = "the reward takes the model itself, so members are evaluated one at a time"
            return "loop"
        inputs = self._probe(batch)
        members = range(min(4, self.population.population_size))
        inputs = {key: x.repeat(len(members), *([1] * (x.ndim - 1))) for key, x in inputs.items()}
        try:
            self.population.verify(**inputs, members=members)
            self.population.mode = "rows"
        except (UnsupportedOperationError, RuntimeError, ValueError, IndexError) as error:
            self.population.mode = "loop"
            self.note = f"members are evaluated one at a time, because: {error}"
        return self.population.mode

    def _probe(self, batch: Batch) -> dict[str, Any]:
        if isinstance(batch, dict):
            ids = self._known(torch.as_tensor(batch["input_ids"]))[:1, :32].to(self.device)
        else:
            text = plain_text(batch[0].prompt) if batch[0].prompt is not None else str(batch[0].text)
            ids = self._known(self.tokenizer(text or "a", return_tensors="pt").input_ids)[:, :32].to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs

    def prepare(self, generation: int) -> None:
        """Draw the generation's noise, of all members: an update needs every pair of it anyway."""
        self.population.prepare(generation)

    @contextlib.contextmanager
    def perturbed(self, generation: int, members: range, sigma: float) -> Iterator[Active | None]:
        """Puts the members into the model: as rows of the batch, or the only one in the place of the center."""
        if self.population.mode == "loop":
            with self.population.member(generation, members[0], sigma=sigma):
                yield None
        else:
            with self.population.perturbed(generation, members, sigma=sigma) as active:
                yield active

    def groups(self, members: range, batch: Batch) -> Iterator[range]:
        """As many members at a time as the settings say, or as fit."""
        if self.population.mode == "loop":
            step = 1
        else:
            step = self.config.members_per_forward or self.members_that_fit(batch)
        for start in range(members.start, members.stop, step):
            yield range(start, min(start + step, members.stop))

    def members_that_fit(self, batch: Batch) -> int:
        """Members evaluated together by default: an even number whose caches, activations and noise fit a budget.

        It does not depend on the memory that is free, so that a resumed run evaluates as it did before.
        """
        return min(self.estimate.members_that_fit(load, rows_budget(self.device)) for load in self._workloads(batch))

    def expectation(self, batch: Batch) -> str:
        """What a generation takes; see :func:`~eggroll.llm.estimate.expect.expectation`."""
        loads = self._workloads(self._repeated(batch))
        together = 1 if self.population.mode == "loop" else self.config.members_per_forward
        members = min(together or self.members_that_fit(self._repeated(batch)), self.config.population_size)
        memory = machine_memory(self.device)[0] if self.device.type in ("cpu", "cuda") else None
        return expectation(self.estimate, loads, members, memory)

    def center_prompts(self, batch: Sequence[Example]) -> int:
        """Held-out prompts that fit the same budget."""
        per_row = max(map(self.estimate.row_bytes, self._workloads(batch)))
        return max(1, min(MOST_CENTER_ROWS, rows_budget(self.device) // per_row) // self.config.samples_per_prompt)

    def _workloads(self, batch: Batch) -> list[Workload]:
        """What a member is evaluated on, for each way of evaluating that the reward needs."""
        rows, found = len(batch["input_ids"]) if isinstance(batch, dict) else len(batch), []
        if self.needs("text"):
            found.append(Workload(rows, self._prompt_length(batch), self.config.max_tokens))
        if self.needs("tokens"):
            length = batch["input_ids"].shape[1] if isinstance(batch, dict) else self.config.max_length
            found.append(Workload(rows, length))
        return found or [Workload(rows, self.config.max_length)]

    def _prompt_length(self, batch: Batch) -> int:
        """Tokens of the longest prompt; of a conversation, what is read before its last turn."""
        if isinstance(batch, dict):
            return int(batch["input_ids"].shape[1])
        first = self.encode(batch).longest
        if self.worlds is None:
            return first
        later = (self.config.max_turns - 1) * (self.config.max_tokens + MESSAGE_TOKENS)
        return min(self.config.max_length, first + MESSAGE_TOKENS + later)

    def complete(
        self, batch: Sequence[Example], active: Active | None, generation: int, members: range
    ) -> tuple[list[str], int]:
        """Completions of all rows by all members, member by member, and how many tokens were made."""
        config = self.config
        pad_id = int(self.tokenizer.pad_token_id or 0)
        ids, mask = self.encode(batch).padded(pad_id, left=not self.encoder_decoder)
        ids, mask = self._known(ids).to(self.device), mask.to(self.device)
        select = None
        if active is not None:
            ids, mask = active.expand(ids), active.expand(mask)
            select = RowSelection(active, torch.arange(active.members).repeat_interleave(len(batch)))
        rows = [member * len(batch) + index for member in members for index in range(len(batch))]
        made = generate(
            self.model,
            ids,
            mask,
            max_tokens=config.max_tokens,
            eos_ids=self.eos_ids,
            pad_id=pad_id,
            sampling=Sampling.for_rows(config.temperature, config.seed, generation, rows),
            select_rows=select,
            prompts=len(batch),
            defaults=self.defaults,
        )
        return self.tokenizer.batch_decode(made, skip_special_tokens=True), sum(map(len, made))

    def speaker(self, batch: Sequence[Example], active: Active | None, generation: int, members: range) -> TurnSpeaker:
        """Lets the rows of a batch hold conversations; caches are kept between their turns where that can be done."""
        rows = [member * len(batch) + index for member in members for index in range(len(batch))]
        return TurnSpeaker(self, active, generation, rows, len(batch))

    def checked_ids(self, ids: Tensor) -> Tensor:
        """Token ids on the model's device; refuses those that the model has no embedding of."""
        return self._known(ids).to(self.device)

    def _known(self, ids: Tensor) -> Tensor:
        """Token ids as they are.

        Raises:
            ModelError: the model's embedding has no row for one of them.
        """
        if self.vocabulary is None or not ids.numel() or int(ids.max()) < self.vocabulary:
            return ids
        beyond = int(ids.max())
        raise ModelError(
            f"the tokenizer gives token {beyond} ({self.tokenizer.convert_ids_to_tokens(beyond)!r}), but the model's "
            f"embedding has {self.vocabulary} rows (0 to {self.vocabulary - 1}). Use the model's own tokenizer, or add "
            "rows for new tokens: model.resize_token_embeddings(len(tokenizer)), and save both"
        )

    def beyond_text(
        self, part: Reward, batch: Batch, active: Active | None, members: int
    ) -> tuple[NDArray[np.float64], int]:
        """Scores by the likelihood of given texts, or by the model itself, and tokens processed."""
        if part.needs == "tokens":
            return self._log_likelihood(part, batch, active)
        values = np.asarray([self._of_model(part, batch)], dtype=np.float64)
        if isinstance(batch, Sequence) and len(self.reward.parts) > 1:
            values = np.repeat(values, len(batch))
        return values, 0

    def _of_model(self, part: Reward, batch: Batch) -> float:
        if isinstance(batch, dict):
            inputs: Any = {key: x.to(self.device) if isinstance(x, Tensor) else x for key, x in batch.items()}
        else:
            texts = [e.text if e.text is not None else plain_text(e.prompt or "") for e in batch]
            side = {"padding_side": "right"} if self.encoder_decoder else {}
            encoded = self.tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=self.config.max_length, **side
            )
            inputs = dict(encoded.to(self.device))
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return part.evaluate(self.model, inputs)

    def _log_likelihood(self, part: Any, batch: Batch, active: Active | None) -> tuple[NDArray[np.float64], int]:
        if isinstance(batch, dict):
            inputs = {key: torch.as_tensor(x).to(self.device) for key, x in batch.items()}
        else:
            inputs = part.encode(batch, device=self.device, encoder_decoder=self.encoder_decoder)
        for name in ("input_ids", "labels"):
            if name in inputs:
                self._known(inputs[name])
        if active is not None:
            inputs = {key: active.expand(x) for key, x in inputs.items()}
        values = part.log_likelihood(self.model, inputs)
        return values.double().cpu().numpy(), int(inputs["input_ids"].numel())
