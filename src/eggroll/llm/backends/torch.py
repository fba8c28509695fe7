"""Scores of all members with the Hugging Face model itself as the population."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.errors import UnsupportedOperationError
from eggroll.llm.backends.passes import reduce_samples
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, columns_of, prompts_of
from eggroll.llm.estimate import Estimate, Workload, rows_budget
from eggroll.llm.generation.chat import encode_prompts, format_prompts, plain_text
from eggroll.llm.generation.generate import Sampling, generate
from eggroll.llm.models.outline import Outline
from eggroll.llm.rewards import Reward
from eggroll.loop import Evaluation, Heldout
from eggroll.torch.population import Active, Population

HELDOUT_MEMBER = -1


@dataclass
class Scores:
    """Scores of some rows: ``values (rows,)``, what was written (text rewards only), tokens processed."""

    values: NDArray[np.float64]
    completions: list[str] = field(default_factory=list)
    tokens: int = 0


class HFEvaluator:
    """Evaluates members and the centre of a population with any mixture of rewards.

    Every kind of parameter can be perturbed. Members are evaluated ``members_per_forward`` at a time as rows of one batch;
    if this model cannot be evaluated so (checked once, :meth:`choose_mode`), one after the other.

    Args:
        population: the members.
        tokenizer: the model's tokenizer, padding on the left.
        reward: what is scored.
        config: the run's settings.
    """

    def __init__(self, population: Population, tokenizer: Any, reward: Reward, config: EggrollConfig) -> None:
        self.population, self.tokenizer, self.reward, self.config = population, tokenizer, reward, config
        self.model: Any = population.model
        self.device = next(self.model.parameters()).device
        self.eos_ids = eos_ids(getattr(self.model, "generation_config", None), self.model.config, tokenizer)
        self.mode_note = ""
        dtype = next(self.model.parameters()).dtype
        self.estimate = Estimate(Outline.of(self.model), config, dtype, tuple(population.specs))

    def choose_mode(self, batch: Sequence[Example] | dict[str, Any]) -> str:
        """Check on a small input that rows hold the members; otherwise settle on one member at a time.

        Returns the mode, ``rows`` or ``loop``; ``mode_note`` says why it is the slow one.
        """
        if self.population.mode != "auto":
            return self.population.mode
        if all(part.needs == "model" for part, _ in self.reward.parts):
            self.population.mode = "loop"
            self.mode_note = "the reward takes the model itself, so members are evaluated one at a time"
            return "loop"
        inputs = self._probe(batch)
        members = range(min(4, self.population.population_size))
        inputs = {key: x.repeat(len(members), *([1] * (x.ndim - 1))) for key, x in inputs.items()}
        try:
            self.population.verify(**inputs, members=members)
            self.population.mode = "rows"
        except (UnsupportedOperationError, RuntimeError, ValueError, IndexError) as error:
            self.population.mode = "loop"
            self.mode_note = f"members are evaluated one at a time, because: {error}"
        return self.population.mode

    def _probe(self, batch: Sequence[Example] | dict[str, Any]) -> dict[str, Any]:
        if isinstance(batch, dict):
            ids = torch.as_tensor(batch["input_ids"])[:1, :32].to(self.device)
        else:
            text = plain_text(batch[0].prompt) if batch[0].prompt is not None else str(batch[0].text)
            ids = self.tokenizer(text or "a", return_tensors="pt").input_ids[:, :32].to(self.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(self.model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
        return inputs

    @torch.no_grad()
    def evaluate(
        self,
        generation: int,
        sigma: float,
        batch: Sequence[Example] | dict[str, Any],
        members: range | None = None,
    ) -> Evaluation:
        """Scores of members (all by default) on a batch: ``(N, prompts)``, or ``(N, 1)`` for rewards of the model."""
        everyone = range(self.population.population_size) if members is None else members
        batch = self._repeated(batch)
        draw_start = time.perf_counter()
        self.population.noise.prepare(generation, self.population.num_pairs, self.device)
        draw_seconds = time.perf_counter() - draw_start
        tables, samples, tokens = [], [], 0
        for part in self._chunks(everyone, batch):
            with self._active(generation, part, sigma) as active:
                scores = self._score(batch, active, generation, part)
            table = scores.values.reshape(len(part), -1)
            tables.append(self._reduced(table))
            tokens += scores.tokens
            if isinstance(batch, Sequence):
                samples += self._samples(batch, part, table, scores.completions, generation)
        return Evaluation(np.concatenate(tables), {"draw_s": draw_seconds}, tokens, samples)

    @torch.no_grad()
    def evaluate_center(self, batch: Sequence[Example] | dict[str, Any], *, max_rows: int = 64) -> Heldout:
        """Mean score of the centre, with its completions as samples."""
        if isinstance(batch, dict):
            return Heldout(float(np.nanmean(self._score(batch, None, 0, range(1)).values)))
        per_row = max(map(self.estimate.row_bytes, self._workloads(batch)))
        rows = max(1, min(max_rows, rows_budget(self.device) // per_row) // self.config.samples_per_prompt)
        values, samples, times = [], [], self.config.samples_per_prompt
        for start in range(0, len(batch), rows):
            part = batch[start : start + rows]
            scores = self._score(self._repeated(part), None, 0, range(1))
            reduced = self._reduced(scores.values.reshape(1, -1))[0]
            values.append(reduced)
            for index, completion in enumerate(scores.completions[::times]):
                samples.append(
                    {
                        "member": HELDOUT_MEMBER,
                        "prompt": plain_text(part[index].prompt or ""),
                        "completion": completion,
                        "reward": float(reduced[index]),
                        "split": "heldout",
                    }
                )
        table = np.concatenate(values)
        finite = table[np.isfinite(table)]
        return Heldout(float(finite.mean()) if finite.size else float("nan"), samples)

    @contextlib.contextmanager
    def _active(self, generation: int, members: range, sigma: float) -> Iterator[Active | None]:
        if self.population.mode == "loop":
            with self.population.member(generation, members[0], sigma=sigma):
                yield None
        else:
            with self.population.perturbed(generation, members, sigma=sigma) as active:
                yield active

    def _repeated(self, batch: Sequence[Example] | dict[str, Any]) -> Sequence[Example] | dict[str, Any]:
        """Each prompt as often as it is sampled, one after the other."""
        times = self.config.samples_per_prompt
        if times == 1 or isinstance(batch, dict) or not self._needs("text"):
            return batch
        return [example for example in batch for _ in range(times)]

    def _reduced(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of samples ``(members, prompts * samples)`` as scores of prompts."""
        times = self.config.samples_per_prompt
        if times == 1 or not self._needs("text") or table.shape[1] % times:
            return table
        return reduce_samples(table.reshape(len(table), -1, times), self.config.pass_at)

    def _chunks(self, everyone: range, batch: Sequence[Example] | dict[str, Any]) -> Iterator[range]:
        if self.population.mode == "loop":
            step = 1
        else:
            step = self.config.members_per_forward or self.members_that_fit(batch)
        for start in range(everyone.start, everyone.stop, step):
            yield range(start, min(start + step, everyone.stop))

    def members_that_fit(self, batch: Sequence[Example] | dict[str, Any]) -> int:
        """Members evaluated together by default: an even number whose caches, activations and noise fit a budget.

        It does not depend on the memory that is free, so that a resumed run evaluates as it did before.
        """
        return min(self.estimate.members_that_fit(load, rows_budget(self.device)) for load in self._workloads(batch))

    def _workloads(self, batch: Sequence[Example] | dict[str, Any]) -> list[Workload]:
        """What a member is evaluated on, for each way of evaluating that the reward needs."""
        rows, found = _batch_rows(batch), []
        if self._needs("text"):
            found.append(Workload(rows, self._prompt_length(batch), self.config.max_tokens))
        if self._needs("tokens"):
            length = batch["input_ids"].shape[1] if isinstance(batch, dict) else self.config.max_length
            found.append(Workload(rows, length))
        return found or [Workload(rows, self.config.max_length)]

    def _prompt_length(self, batch: Sequence[Example] | dict[str, Any]) -> int:
        """Tokens of the longest prompt."""
        if isinstance(batch, dict):
            return int(batch["input_ids"].shape[1])
        return int(self._encode(batch).input_ids.shape[1])

    def _needs(self, kind: str) -> bool:
        return any(part.needs == kind for part, _ in self.reward.parts)

    def _score(
        self, batch: Sequence[Example] | dict[str, Any], active: Active | None, generation: int, members: range
    ) -> Scores:
        """Weighted scores of ``len(members)`` members (or the centre) on a batch, member by member."""
        total: NDArray[np.float64] | float = 0.0
        completions: list[str] = []
        tokens = 0
        if self._needs("text"):
            if isinstance(batch, dict):
                batch = _examples_of(batch, self.tokenizer)
            completions, made = self.complete(batch, active, generation, members)
            tokens += made
        for part, weight in self.reward.parts:
            if part.needs == "text":
                assert not isinstance(batch, dict)
                prompts = prompts_of(batch) * len(members)
                columns = {key: values * len(members) for key, values in columns_of(batch).items()}
                values = np.asarray(part.score(prompts, completions, columns), dtype=np.float64)
            elif part.needs == "tokens":
                values, used = self._log_likelihood(part, batch, active, len(members))
                tokens += used
            else:
                values = np.asarray([self._of_model(part, batch)], dtype=np.float64)
                if isinstance(batch, Sequence) and len(self.reward.parts) > 1:
                    values = np.repeat(values, len(batch))
            total = total + weight * values
        return Scores(np.asarray(total), completions, tokens)

    def _of_model(self, part: Reward, batch: Sequence[Example] | dict[str, Any]) -> float:
        if isinstance(batch, dict):
            inputs: Any = {key: x.to(self.device) if isinstance(x, Tensor) else x for key, x in batch.items()}
        else:
            texts = [e.text if e.text is not None else plain_text(e.prompt or "") for e in batch]
            encoded = self.tokenizer(
                texts, return_tensors="pt", padding=True, truncation=True, max_length=self.config.max_length
            )
            inputs = dict(encoded.to(self.device))
            inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return part.evaluate(self.model, inputs)

    def _log_likelihood(
        self, part: Any, batch: Sequence[Example] | dict[str, Any], active: Active | None, members: int
    ) -> tuple[NDArray[np.float64], int]:
        if isinstance(batch, dict):
            inputs = {key: torch.as_tensor(x).to(self.device) for key, x in batch.items()}
        else:
            is_encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
            inputs = part.encode(batch, device=self.device, encoder_decoder=is_encoder_decoder)
        if active is not None:
            inputs = {key: active.expand(x) for key, x in inputs.items()}
        values = part.log_likelihood(self.model, inputs)
        return values.double().cpu().numpy(), int(inputs["input_ids"].numel())

    def _encode(self, batch: Sequence[Example]) -> Any:
        """Prompts as token ids, padded on the left."""
        texts = format_prompts(self.tokenizer, prompts_of(batch), chat=self.config.chat, system=self.config.system)
        length = self.config.max_length
        return encode_prompts(self.tokenizer, texts, length, return_tensors="pt", padding=True, padding_side="left")

    def complete(
        self, batch: Sequence[Example], active: Active | None, generation: int, members: range
    ) -> tuple[list[str], int]:
        """Completions of all prompts by all members, member by member, and how many tokens were made."""
        config = self.config
        encoded = self._encode(batch)
        ids, mask = encoded.input_ids.to(self.device), encoded.attention_mask.to(self.device)
        select = None
        if active is not None:
            ids, mask = active.expand(ids), active.expand(mask)
            select = _RowSelection(active, len(batch))
        rows = [member * len(batch) + index for member in members for index in range(len(batch))]
        made = generate(
            self.model,
            ids,
            mask,
            max_tokens=config.max_tokens,
            eos_ids=self.eos_ids,
            pad_id=int(self.tokenizer.pad_token_id or 0),
            sampling=Sampling.for_rows(config.temperature, config.seed, generation, rows),
            select_rows=select,
            prompts=len(batch),
        )
        return self.tokenizer.batch_decode(made, skip_special_tokens=True), sum(map(len, made))

    def _samples(
        self, batch: Sequence[Example], members: range, table: NDArray[Any], completions: list[str], generation: int
    ) -> list[dict[str, Any]]:
        rows = []
        for position, member in enumerate(members):
            if member >= self.config.samples_per_generation or not completions:
                continue
            index = generation % len(batch)
            rows.append(
                {
                    "member": member,
                    "prompt": plain_text(batch[index].prompt or ""),
                    "completion": completions[position * len(batch) + index],
                    "reward": float(table[position, index]),
                    "split": "train",
                }
            )
        return rows


class _RowSelection:
    """Keeps track of which member each remaining row belongs to."""

    def __init__(self, active: Active, rows_per_member: int) -> None:
        self.active = active
        self.member_of_row = torch.arange(active.members).repeat_interleave(rows_per_member)

    def __call__(self, keep: Tensor) -> None:
        self.member_of_row = self.member_of_row[keep.cpu()]
        self.active.select_rows(self.member_of_row.to(keep.device))


def _batch_rows(batch: Sequence[Example] | dict[str, Any]) -> int:
    return len(batch["input_ids"]) if isinstance(batch, dict) else len(batch)


def _examples_of(batch: dict[str, Any], tokenizer: Any) -> list[Example]:
    """Prompts of a tokenised batch, for rewards that read text."""
    return [Example(text) for text in tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)]


def eos_ids(*sources: Any) -> list[int]:
    """The tokens that end a completion, after a generation config, a model's config and a tokenizer."""
    found: list[int] = []
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        if value is not None:
            found += list(value) if isinstance(value, list | tuple) else [value]
    return sorted(set(found))
