"""What the generation loop moves: the integer model, how a generation is scored, and how a record becomes steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError
from eggroll.loop import Evaluation, fitness_metrics
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import Corpus, window_starts, windows
from eggroll.pretrain.engines.base import STATE, Engine, run_center, run_members
from eggroll.pretrain.engines.choose import make_engine
from eggroll.pretrain.measure import bits_per_byte, sample
from eggroll.pretrain.model.fixed_point import ONE
from eggroll.pretrain.model.oracle import init_params
from eggroll.pretrain.update import make_step, shape_pairs
from eggroll.torch.devices import find_device

MOMENTUM = "momentum."
PART = 1 << 16
"""Members whose windows are in memory at once."""


def open_engine(options: PretrainOptions, params: Mapping[str, NDArray[np.int8]]) -> Engine:
    """The engine that the options ask for.

    Raises:
        ConfigError: it cannot be used here.
    """
    backend, device = options.backend, options.device
    if device != "auto":
        find_device(device)  # a word that is no device is refused here
    if device == "auto":
        device = "cpu"
        if backend != "c" and torch.cuda.is_available():
            from eggroll.pretrain.engines import library

            device = "cuda" if backend == "torch" or not library.multiplies_bytes() else "cpu"
    return make_engine(
        params,
        options.make_noise(),
        sigma_shift=options.sigma_shift,
        backend=backend,
        threads=options.threads,
        chunk=options.members_per_forward,
        device=device,
    )


class IntegerLearner:
    """See :class:`eggroll.loop.Learner`. The weights of generation t are those of t - 1 and the record of t alone."""

    def __init__(self, options: PretrainOptions, corpus: Corpus | None) -> None:
        self.options, self.corpus, self.config = options, corpus, options.es()
        self.engine = open_engine(options, init_params(options.shape, options.seed))

    def evaluate(self, generation: int, sigma: float) -> Evaluation:
        """Score all members: the record holds a number per pair, the metrics are of the members' bits per byte."""
        options = self.options
        scores = np.empty(options.pop_size, np.int32)
        size = max(options.group_size, PART // options.group_size * options.group_size)
        for first in range(0, options.pop_size, size):
            part = slice(first, min(first + size, options.pop_size))
            scores[part] = self._scores(generation, np.arange(part.start, part.stop))
        weights = shape_pairs(scores, options.fitness)
        bits = scores / (ONE * options.tokens)
        metrics = {**fitness_metrics(bits), "ties": float((weights == 0).mean())}
        return Evaluation(weights / ONE, metrics, tokens=options.pop_size * options.tokens)

    def _scores(self, generation: int, members: NDArray[np.int64]) -> NDArray[np.int32]:
        options, corpus = self.options, self.corpus
        assert corpus is not None, "a learner without data can only replay"
        length, groups = options.context + options.tokens + 1, options.pop_size // options.group_size
        starts = window_starts(corpus.train, groups, length, seed=options.seed, generation=generation)
        group = members // options.group_size
        read = windows(corpus.train, starts[group[0] : group[-1] + 1], length)
        state = None
        if options.context:
            before = np.ascontiguousarray(read[:, : options.context + 1])
            state = run_center(self.engine, before, outputs=STATE).state
        scored = np.ascontiguousarray(read[:, options.context :])
        found = run_members(self.engine, generation, members, scored, group - group[0], state)
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
        moved = self.engine.update(record.generation, np.arange(len(pairs), dtype=np.int64), pairs, step)
        return math.sqrt(moved) / ONE

    def bits_per_byte(self, stream: NDArray[np.uint8], limit: int | None = None) -> tuple[float, int]:
        """Bits per byte of a text, and how many bytes were predicted."""
        return bits_per_byte(self.engine, stream, limit)

    def sample(self, prompt: bytes, length: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
        """What the model writes after a prompt."""
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
        for name, value in tensors.items():
            if name.startswith(MOMENTUM):
                self.engine.momentum[name.removeprefix(MOMENTUM)] = np.array(value.numpy(), np.int32)
            else:
                params[name][...] = value.numpy()
        self.engine.reload()
