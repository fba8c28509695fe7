"""The integer model as a worker: how members are scored, and how a record becomes steps.

A worker scores members, applies records, and gives and takes the state (:class:`eggroll.loop.Worker`). Scores depend on
the generation, the members and the weights alone, so any number of workers can share a generation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eggroll.core.records import UpdateRecord
from eggroll.core.turning import Turning, stride_of
from eggroll.errors import CheckpointError
from eggroll.loop import Evaluation, Heldout
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import Corpus, window_starts, windows
from eggroll.pretrain.engines.base import STATE, run_center, run_members
from eggroll.pretrain.engines.choose import choose_device, make_engine
from eggroll.pretrain.measure import bits_per_byte, sample
from eggroll.pretrain.model.fixed_point import ONE
from eggroll.pretrain.model.oracle import init_params
from eggroll.pretrain.update import make_step

MOMENTUM = "momentum."
PART = 1 << 16
"""Members whose windows are in memory at once."""


class PretrainWorker(ABC):
    """What the integer and the floating-point model have in common.

    Args:
        options: the settings.
        corpus: what to learn from; ``None`` for a model that is only replayed or sampled from.
    """

    def __init__(self, options: PretrainOptions, corpus: Corpus | None = None) -> None:
        self.options, self._corpus = options, corpus

    @property
    def corpus(self) -> Corpus:
        """Training and held-out bytes."""
        assert self._corpus is not None, "a worker without data can only apply records and generate text"
        return self._corpus

    @property
    @abstractmethod
    def engine_name(self) -> str:
        """What runs the model."""

    def windows(self, generation: int, members: range) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The windows of the members' groups ``(groups, length)``, and which of them each member reads."""
        options = self.options
        length = options.context + options.tokens + 1
        groups = np.arange(members.start, members.stop) // options.group_size
        first, count = int(groups[0]), int(groups[-1] - groups[0]) + 1
        starts = window_starts(self.corpus.train, count, length, seed=options.seed, generation=generation, first=first)
        return windows(self.corpus.train, starts, length), groups - first

    def heldout(self, generation: int) -> Heldout:
        """Bits per byte of held-out text, of all of it after the last generation; now and then a sample of text."""
        options = self.options
        last = generation == options.generations
        bits, count = self.bits_per_byte(self.corpus.validation, None if last else options.eval_tokens)
        samples, every = [], options.sample_every
        if every and (last or generation % every < options.eval_every):
            made = self.sample(options.prompt.encode(), options.sample_length, seed=generation)
            text = made.decode("utf-8", errors="replace")
            samples = [{"member": -1, "prompt": options.prompt, "completion": text, "reward": -bits}]
        metrics = {"validation_bits_per_byte": bits, "validation_bytes": float(count)}
        return Heldout(-bits, samples, metrics)

    @abstractmethod
    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score members: minus the bits per byte of each on its group's window, ``(len(members),)`` float64."""

    @abstractmethod
    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""

    @abstractmethod
    def bits_per_byte(self, stream: NDArray[np.uint8], limit: int | None = None) -> tuple[float, int]:
        """Bits per byte of a text, and how many bytes were predicted."""

    @abstractmethod
    def sample(self, prompt: bytes, length: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
        """Text that the model generates after a prompt."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters by name."""

    @abstractmethod
    def state_tensors(self) -> Mapping[str, Any]:
        """Everything that the next update depends on."""

    @abstractmethod
    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`."""


class IntegerWorker(PretrainWorker):
    """The integer model. The weights of generation t are those of t - 1 and the record of t alone."""

    def __init__(self, options: PretrainOptions, corpus: Corpus | None = None) -> None:
        super().__init__(options, corpus)
        self._turning = Turning()
        self.engine = make_engine(
            init_params(options.shape, options.seed),
            options.make_noise(),
            sigma_shift=options.sigma_shift,
            backend=options.backend,
            threads=options.threads,
            chunk=options.members_per_forward,
            device=choose_device(options.backend, options.device),
        )

    @property
    def engine_name(self) -> str:
        """What runs the model."""
        return type(self.engine).__name__

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score members, in bits per byte; times ``16 * tokens`` a score is the whole number that the model computed.

        ``sigma`` is ``2^-sigma_shift`` in every generation.
        """
        parts = [members[first : first + PART] for first in range(0, len(members), PART)]
        scores = np.concatenate([self._scores(generation, part) for part in parts])
        return Evaluation(scores / (ONE * self.options.tokens), tokens=len(members) * self.options.tokens)

    def _scores(self, generation: int, members: range) -> NDArray[np.int32]:
        """Sums of the log likelihood over each member's window, sixteenths of a bit: ``(len(members),)``."""
        context = self.options.context
        read, group = self.windows(generation, members)
        state = None
        if context:
            before = np.ascontiguousarray(read[:, : context + 1])
            state = run_center(self.engine, before, outputs=STATE).state
        scored = np.ascontiguousarray(read[:, context:])
        numbers = np.arange(members.start, members.stop)
        found = run_members(self.engine, generation, numbers, scored, group, state)
        assert found.fitness is not None
        return found.fitness

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change, where 1.0 is 16."""
        options = self.options
        pairs = np.rint(record.weights * ONE).astype(np.int8)
        step = make_step(
            pairs,
            record.lr,
            options.rank,
            generation=record.generation,
            momentum_shift=options.momentum_shift,
            sign_of_noise=options.sign_of_noise,
        )
        before = self._sampled()
        moved = self.engine.update(record.generation, np.arange(len(pairs), dtype=np.int64), pairs, step)
        for name, (now, stride) in self._sampled().items():
            self._turning.add(name, now - before[name][0], stride)
        self._turning.finish()
        return math.sqrt(moved) / ONE

    def _sampled(self) -> dict[str, tuple[NDArray[np.int16], int]]:
        """Some entries of each parameter, and the distance between them."""
        strides = {name: stride_of(value.shape) for name, value in self.engine.params.items()}
        return {
            name: (value.reshape(-1)[:: strides[name]].astype(np.int16), strides[name])
            for name, value in self.engine.params.items()
        }

    @property
    def update_cosine(self) -> float | None:
        """See :class:`eggroll.loop.Worker`."""
        return self._turning.cosine

    def bits_per_byte(self, stream: NDArray[np.uint8], limit: int | None = None) -> tuple[float, int]:
        """Bits per byte of a text, and how many bytes were predicted."""
        return bits_per_byte(self.engine, stream, limit)

    def sample(self, prompt: bytes, length: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
        """Text that the model generates after a prompt."""
        return sample(self.engine, prompt, length, temperature=temperature, seed=seed)

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters, int8, by name."""
        return {name: torch.from_numpy(value) for name, value in self.engine.params.items()}

    def state_tensors(self) -> Mapping[str, Any]:
        """Parameters, int8, by name; momentum, int32, with a prefix."""
        momentum = {MOMENTUM + name: torch.from_numpy(value) for name, value in self.engine.momentum.items()}
        return {**self.weights(), **momentum}

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`.

        Raises:
            CheckpointError: they are of a model of another shape.
        """
        params = self.engine.params
        found = {name: tuple(value.shape) for name, value in tensors.items() if not name.startswith(MOMENTUM)}
        wrong = [
            f"{name} {found.get(name, 'missing')} instead of {params[name].shape if name in params else 'none'}"
            for name in dict.fromkeys([*params, *found])
            if name not in params or found.get(name) != params[name].shape
        ]
        if wrong:
            raise CheckpointError(
                f"the checkpoint is of a model of another shape: {'; '.join(wrong[:4])}; resume with the n_layers and "
                "hidden of the run"
            )
        self.engine.momentum.clear()
        for name, value in tensors.items():
            if name.startswith(MOMENTUM):
                self.engine.momentum[name.removeprefix(MOMENTUM)] = np.asarray(value).astype(np.int32)
            else:
                params[name][...] = np.asarray(value)
        self.engine.reload()
