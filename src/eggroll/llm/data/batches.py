"""What each generation is scored on, the same on every machine, and the held-out data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from eggroll.core import threefry
from eggroll.errors import DataError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, Purpose, load_examples

Batch = Sequence[Example] | dict[str, Any]
"""Examples, or tokenized rows: ``input_ids`` and what goes with them."""


def batches(examples: Sequence[Example], size: int, generation: int, seed: int) -> list[Example]:
    """The examples of one generation: a shuffled pass over the set after the other.

    A pure function of its arguments, so that a resumed run sees the same batches. Within an epoch every example comes
    at least once; a last batch that would be short is filled from the start of the same pass. No example comes twice
    in a batch, so a ``size`` above the number of examples gives all of them.
    """
    if not examples:
        raise DataError("there are no examples to take a batch from")
    if size < 1:
        raise DataError(f"the number of examples per generation (={size}) must be at least 1")
    size = min(size, len(examples))
    per_epoch = -(-len(examples) // size)
    epoch, step = divmod(generation, per_epoch)
    order = _epoch_order(len(examples), epoch, seed)
    return [examples[order[index % len(examples)]] for index in range(step * size, (step + 1) * size)]


def _epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    """A permutation of ``range(count)`` from the same noise as everything else, so that no library can change it."""
    key = threefry.fold_in(threefry.fold_in(threefry.seed_key(seed), threefry.name_hash("data order") >> 32), epoch)
    return [int(index) for index in np.argsort(threefry.random_bits(key, count), kind="stable")]


class BatchSource:
    """Batches by generation, from examples or from tokenized batches.

    Args:
        data: what :meth:`EggrollTrainer.evolve` takes.
        config: the run's settings.
        purpose: whether the reward reads texts or answers to prompts (``Reward.reads``).

    Raises:
        DataError: the data is empty or of the wrong form.
    """

    def __init__(self, data: Any, config: EggrollConfig, purpose: Purpose) -> None:
        self.config = config
        self.stream: list[dict[str, Any]] | None = None
        self.examples: list[Example] = []
        if is_batches(data):
            self.stream = [_as_batch(item) for item in data]
            if not self.stream:
                raise DataError("the data loader yields no batch")
        else:
            self.examples = load_examples(data, purpose=purpose)

    def at(self, generation: int) -> Batch:
        """The batch of a generation, the same on every machine."""
        if self.stream is not None:
            return self.stream[generation % len(self.stream)]
        return batches(self.examples, self.config.prompts_per_generation, generation, self.config.seed)

    def everything(self) -> Batch:
        """All of it, for held-out data."""
        if self.stream is None:
            return self.examples
        if len({tuple(batch["input_ids"].shape[1:]) for batch in self.stream}) > 1:
            raise DataError("held-out batches have different lengths; give held-out data as texts or prompts instead")
        return {key: torch.cat([batch[key] for batch in self.stream]) for key in self.stream[0]}


def is_batches(data: Any) -> bool:
    """Whether data consists of tokenized batches rather than of prompts or texts."""
    if isinstance(data, torch.utils.data.DataLoader):
        return True
    if isinstance(data, list | tuple) and data:
        first = data[0]
        return hasattr(first, "keys") and "input_ids" in first
    return False


def _as_batch(item: Any) -> dict[str, Any]:
    if hasattr(item, "keys") and "input_ids" in item:
        return {key: torch.as_tensor(value) for key, value in item.items()}
    if isinstance(item, torch.Tensor):
        return {"input_ids": item}
    if isinstance(item, list | tuple) and item and isinstance(item[0], torch.Tensor):
        names = itertools.chain(("input_ids", "attention_mask", "labels"))
        return dict(zip(names, item, strict=False))
    raise DataError(
        f"a batch must be a mapping with 'input_ids' or a tensor of token ids, got {type(item).__name__}. For prompts "
        "give a list of strings or a data set instead of a DataLoader"
    )
