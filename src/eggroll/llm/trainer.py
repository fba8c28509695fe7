"""The trainer: a Hugging Face model, a reward and prompts in; a model that scores better out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from eggroll.core.select import ParameterSpec
from eggroll.errors import ConfigError, DataError, RunError
from eggroll.llm.backends.torch import HFEvaluator
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, batches, load_examples
from eggroll.llm.estimate import check_memory
from eggroll.llm.models.export import save_pretrained
from eggroll.llm.models.outline import Outline, exclude_of, separate_head
from eggroll.llm.rewards import Reward
from eggroll.llm.rewards.load import as_reward
from eggroll.loop import Evaluation, Heldout, Learner, Listener, Loop
from eggroll.run.run_dir import RunDir
from eggroll.torch.replica import Replica

Batch = Sequence[Example] | dict[str, Any]
MAY_CHANGE_ON_RESUME = ("generations", "eval_every", "checkpoint_every", "samples_per_generation")
"""Settings that a resumed run may change: they do not touch what was computed before."""


class EggrollTrainer:
    """Evolves a Hugging Face model on a reward, without gradients.

    ::

        trainer = EggrollTrainer(model, EggrollConfig(population_size=64), reward, tokenizer)
        trainer.evolve(["What is 2+2?", "Explain gravity."])
        trainer.save("./evolved-model")

    Args:
        model: a model with a generation head; it is put into evaluation mode and changed in place.
        config: the settings.
        reward: a :class:`~eggroll.llm.rewards.Reward`, a TRL-style function ``reward(prompts, completions,
            **columns)``, a list of those, or ``score(text) -> float``.
        tokenizer: the model's tokenizer.

    Raises:
        MemoryBudgetError: the run cannot fit into this machine's memory.
    """

    def __init__(self, model: Any, config: EggrollConfig, reward: Any, tokenizer: Any) -> None:
        self._begin(config, as_reward(reward, tokenizer), tokenizer)
        self.model = model.eval()
        first = next(model.parameters())
        check_memory(Outline.of(model), config, first.dtype, first.device)
        self.replica = replica_for(model, config)
        self.learner: Learner = self.replica
        self.evaluator: Any = HFEvaluator(self.replica.population, tokenizer, self.reward, config)

    def _begin(self, config: EggrollConfig, reward: Reward, tokenizer: Any) -> None:
        """What every backend has."""
        self.config, self.reward, self.tokenizer = config, reward, tokenizer
        if getattr(tokenizer, "pad_token_id", None) is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.history: list[dict[str, Any]] = []
        self.interrupted = False
        self.done = 0

    @property
    def evolved(self) -> list[ParameterSpec]:
        """The parameters that are evolved."""
        return self.replica.population.specs

    def evolve(
        self,
        data: Any,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        *,
        eval_data: Any = None,
        run: RunDir | None = None,
        resume: bool = False,
        listeners: Iterable[Listener] = (),
    ) -> list[dict[str, Any]]:
        """Run the generations; returns the history: one dict of metrics per generation.

        Args:
            data: prompts or texts (whatever :func:`~eggroll.llm.load_examples` reads), or a ``DataLoader`` (or any
                iterable) of tokenised batches.
            callback: called with each generation's metrics; if it returns ``False``, the run ends.
            eval_data: held-out data in the same forms; the centre is scored on it before, during and after.
            run: a run directory for logs and checkpoints.
            resume: continue ``run`` after its last logged generation.
            listeners: further objects with ``generation(metrics)``, such as a live display; their ``message(text)``, if
                they have one, is told why members are evaluated one at a time.

        A trainer goes on where it is: after :meth:`load_checkpoint`, or after a callback or Ctrl-C has ended a run, the
        rest of ``config.generations`` is run.

        Raises:
            DataError: the data is empty or of the wrong form.
            RewardError: the reward fails.
            ConfigError: all generations are done already.
        """
        source = BatchSource(data, self.config, self.reward)
        heldout = None if eval_data is None else BatchSource(eval_data, self.config, self.reward).everything()
        listeners = list(listeners)
        self.evaluator.choose_mode(source.at(0))
        for listener in listeners:
            if self.evaluator.mode_note and hasattr(listener, "message"):
                listener.message(self.evaluator.mode_note)

        def evaluate(generation: int, sigma: float) -> Evaluation:
            return self.evaluator.evaluate(generation, sigma, source.at(generation))

        def evaluate_center() -> Heldout:
            assert heldout is not None
            return self.evaluator.evaluate_center(heldout)

        loop = Loop(
            config=self.config,
            learner=self.learner,
            evaluate=evaluate,
            heldout=evaluate_center if heldout is not None else None,
            eval_every=self.config.eval_every,
            run=run,
            checkpoint_every=self.config.checkpoint_every,
            listeners=listeners,
            # A callback that has ended this trainer's run is not asked again when it goes on.
            stop=None if callback is None else lambda m: m["generation"] > self.done and callback(m) is False,
        )
        start = loop.resume() if resume else self._start(loop)
        self.history = loop.go(start)
        self.interrupted, self.done = loop.interrupted, loop.applied
        return self.history

    def _start(self, loop: Loop) -> int:
        if 0 < self.config.generations <= self.done:
            raise ConfigError(
                f"all {self.done} generations of this trainer are done. To go on, make a trainer for the evolved model "
                "with another seed, or load_checkpoint() into one whose config has more generations"
            )
        loop.history = list(self.history)
        return self.done

    def save(self, directory: str | Path, *, metadata: dict[str, Any] | None = None) -> Path:
        """Write the model as a plain Hugging Face directory that ``from_pretrained`` loads."""
        about = {"generations": self.done, "reward": self.reward.name, "config": self.config.to_dict()}
        return save_pretrained(self.model, self.tokenizer, directory, metadata={**about, **(metadata or {})})

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write the evolved parameters and the optimizer's state, so that :meth:`load_checkpoint` can go on."""
        run = RunDir.create(path, self.config.to_dict()) if not Path(path).exists() else RunDir.open(path)
        return run.save_checkpoint(self.done, self.learner.state_tensors(), {"config": self.config.to_dict()})

    def load_checkpoint(self, path: str | Path) -> int:
        """Put back what :meth:`save_checkpoint` wrote; returns the number of finished generations.

        Raises:
            RunError: there is no checkpoint.
        """
        checkpoint = RunDir.open(path).latest_checkpoint()
        if checkpoint is None:
            raise RunError(f"{path} holds no checkpoint")
        self.learner.load_state_tensors(checkpoint.load())
        self.done = checkpoint.generation
        return self.done


def replica_for(model: Any, config: EggrollConfig) -> Replica:
    """The replica that a run with these settings has: which parameters it evolves, and how they are updated."""
    exclude = exclude_of(config, separate_head(model))
    return Replica(model.eval(), dataclasses.replace(config, exclude=exclude), kinds=config.kinds)


class BatchSource:
    """Batches by generation, from examples or from tokenised batches.

    Args:
        data: what :meth:`EggrollTrainer.evolve` takes.
        config: the run's settings.
        reward: says whether texts or prompts are read.

    Raises:
        DataError: the data is empty or of the wrong form.
    """

    def __init__(self, data: Any, config: EggrollConfig, reward: Reward) -> None:
        self.config = config
        self.stream: list[dict[str, Any]] | None = None
        self.examples: list[Example] = []
        if is_batches(data):
            self.stream = [_as_batch(item) for item in data]
            if not self.stream:
                raise DataError("the data loader yields no batch")
        else:
            purpose = "text" if all(part.needs == "tokens" for part, _ in reward.parts) else "prompts"
            self.examples = load_examples(data, purpose=purpose)  # type: ignore[arg-type]

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
    """Whether data consists of tokenised batches rather than of prompts or texts."""
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
