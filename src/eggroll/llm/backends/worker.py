"""A language model that evolves in this process, on PyTorch or on vLLM: a :class:`eggroll.loop.Worker`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from eggroll.core.records import UpdateRecord
from eggroll.core.select import ParameterSpec
from eggroll.llm.backends.scoring import Evaluator
from eggroll.llm.config import EggrollConfig, Quantize
from eggroll.llm.data.batches import Batch, BatchSource
from eggroll.llm.models.export import save_pretrained
from eggroll.llm.models.loading import load
from eggroll.llm.rewards import Reward
from eggroll.llm.rewards.columns import check_columns
from eggroll.loop import Evaluation, Heldout, Worker
from eggroll.torch.quantized.tensor import stored


@dataclass(frozen=True)
class Setup:
    """What a run is made of, whoever computes it.

    Attributes:
        config: the settings.
        reward: what is scored.
        tokenizer: the model's.
        specs: the evolved parameters.
        name: the model's name, for display.
        parameters: how many the whole model has.
        dtype: of the weights.
        place: where they are.
        notes: what was chosen and why.
        base: the model that the run begins with (directory, hub id or alias); ``None`` for a module of the user's.
        trust_remote_code: run code that comes with the model.
        generation: what becomes of the model's generation config, in a line, if there is something to say.
        quantize: the format of its weights.
        revision: of its hub id.
    """

    config: EggrollConfig
    reward: Reward
    tokenizer: Any
    specs: tuple[ParameterSpec, ...]
    name: str
    parameters: int
    dtype: torch.dtype
    place: str
    notes: tuple[str, ...] = ()
    base: str | None = None
    trust_remote_code: bool = False
    generation: tuple[str, ...] = ()
    quantize: Quantize = "auto"
    revision: str | None = None

    @property
    def dtype_name(self) -> str:
        """``float32``, ``bfloat16``, ..."""
        return str(self.dtype).removeprefix("torch.")

    def load_base(self) -> Any:
        """The model that the run begins with, in PyTorch on the CPU."""
        assert self.base is not None
        trust = self.trust_remote_code
        return load(
            self.base, dtype=self.dtype, device="cpu", trust_remote_code=trust, quantize=self.quantize,
            revision=self.revision,
        ).model  # fmt: skip

    @torch.no_grad()
    def with_state(self, state: Mapping[str, Any]) -> Any:
        """The model with the evolved parameters of a state, in PyTorch on the CPU."""
        model = self.load_base()
        parameters = dict(model.named_parameters())
        for spec in self.specs:
            stored(parameters[spec.name]).copy_(state[f"parameter/{spec.name}"])
        return model


class ModelWorker(Worker, Protocol):
    """What a trainer holds: a worker of the loop that knows what it is made of, and is told its data."""

    setup: Setup
    module: Any
    """The module that is evolved in place; ``None`` where the weights are somewhere else."""

    @property
    def note(self) -> str:
        """Why members are evaluated in a slow way; empty if they are not."""
        return ""

    def use(self, data: Any, eval_data: Any = None) -> None:
        """Take the data to train on and the held-out data."""

    def settle(self, config: EggrollConfig) -> None:
        """Take over settings that were chosen since: sigma, the learning rate, the number of generations."""
        self.setup = replace(self.setup, config=config)

    def close(self) -> None:
        """Free what is held outside of this process's memory. The worker cannot be used after that."""

    def model(self) -> Any:
        """The evolved model in PyTorch: the module itself, or a copy on the CPU of weights that are elsewhere."""
        return self.module if self.module is not None else self.setup.with_state(self.state_tensors())

    def save(self, directory: str | Path, metadata: Mapping[str, Any]) -> Path:
        """Write the evolved model as a plain Hugging Face directory that ``from_pretrained`` loads.

        Args:
            directory: where to.
            metadata: further entries of ``eggroll.json``.
        """
        setup = self.setup
        about: dict[str, Any] = {} if setup.base is None else {"base_model": setup.base}
        about |= {} if setup.revision is None else {"base_model_revision": setup.revision}
        about |= {"reward": setup.reward.name, "config": setup.config.to_dict(), **metadata}
        return save_pretrained(self.model(), setup.tokenizer, directory, metadata=about)


class LanguageWorker(ModelWorker):
    """An evaluator, the replica or engine whose weights it reads, and the data.

    Args:
        setup: what the run is made of.
        evaluator: scores members and the center.
        learner: takes updates: a :class:`~eggroll.torch.replica.Replica` or a vLLM engine.
        module: the module that is evolved in place; ``None`` where the weights are in an engine.
    """

    def __init__(self, setup: Setup, evaluator: Evaluator, learner: Any, module: Any = None) -> None:
        self.setup, self.evaluator, self.learner, self.module = setup, evaluator, learner, module
        self.source: BatchSource | None = None
        self._heldout: Batch = []

    @property
    def note(self) -> str:
        """Why members are evaluated in a slow way; empty if they are not."""
        return self.evaluator.note

    def use(self, data: Any, eval_data: Any = None) -> None:
        """Take the data to train on and the held-out data, and choose how members are evaluated on them.

        Raises:
            DataError: the data is empty or of the wrong form.
            ConfigError: it is tokenized, and the backend takes prompts.
            RewardError: it lacks a column that the reward asks for.
        """
        config, purpose = self.setup.config, self.setup.reward.reads
        self.source = BatchSource(data, config, purpose)
        self._heldout = [] if eval_data is None else BatchSource(eval_data, config, purpose).everything()
        if self.source.stream is None:
            check_columns(self.setup.reward, self.source.examples)
        if eval_data is not None and isinstance(self._heldout, Sequence):
            check_columns(self.setup.reward, self._heldout, "the held-out data set")
        self.evaluator.choose_mode(self.source.at(0))

    def settle(self, config: EggrollConfig) -> None:
        """Take over settings that were chosen since: sigma, the learning rate, the number of generations."""
        super().settle(config)
        self.evaluator.config = config

    def expectation(self) -> str:
        """A line about what a generation takes; empty where it is not known."""
        return "" if self.source is None else self.evaluator.expectation(self.source.at(0))

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score some members on the generation's batch, which every worker chooses alike."""
        assert self.source is not None, "use() comes first"
        return self.evaluator.evaluate(generation, sigma, self.source.at(generation), members)

    def heldout(self, generation: int) -> Heldout:
        """The center on the held-out data."""
        return self.evaluator.heldout(self._heldout, generation)

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        return self.learner.apply(record)

    @property
    def update_cosine(self) -> float | None:
        """See :class:`eggroll.loop.Worker`; ``None`` where the backend does not measure it."""
        updater = getattr(self.learner, "updater", None)
        found: float | None = (
            getattr(self.learner, "update_cosine", None) if updater is None else updater.turning.cosine
        )
        return found

    def state_tensors(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return self.learner.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`."""
        self.learner.load_state_tensors(tensors)

    def close(self) -> None:
        """Free the engine. The worker cannot be used after that."""
        close = getattr(self.learner, "close", None)
        if close is not None:
            close()
