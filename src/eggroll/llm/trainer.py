"""The trainer: a Hugging Face model, a reward and prompts in; a model that scores better out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

from eggroll.core.select import ParameterSpec
from eggroll.errors import ConfigError, RunError
from eggroll.llm.backends.build import BackendName, WorkerFactory, worker_of
from eggroll.llm.backends.pool import PoolWorker
from eggroll.llm.backends.worker import ModelWorker
from eggroll.llm.config import Attention, EggrollConfig, Quantize
from eggroll.llm.judging import unscored_line
from eggroll.llm.models.push import check_push, later, push
from eggroll.llm.worlds.load import with_world
from eggroll.loop import Listener, Loop
from eggroll.run.keeping import Keep, Kept, Standing, check_keep, check_patience
from eggroll.run.lock import locked
from eggroll.run.run_dir import RunDir

SPREAD_ADVICE = (
    "a reward with more steps (some points for a part of the task), a larger sigma, more prompts per generation, or a "
    "temperature above 0"
)
"""What to try when all members of a generation score the same."""


class EggrollTrainer:
    """Evolves a Hugging Face model on a reward, without gradients.

    ::

        trainer = EggrollTrainer(model, EggrollConfig(population_size=64), reward, tokenizer)
        trainer.evolve(["What is 2+2?", "Explain gravity."])
        trainer.save("./evolved-model")

    :meth:`from_model_id` does the same with vLLM as the engine, or with many workers.

    Args:
        model: a model with a generation head; it is put into evaluation mode and changed in place.
        config: the settings.
        reward: a :class:`~eggroll.llm.rewards.Reward`, a TRL-style function ``reward(prompts, completions,
            **columns)``, a list of those, or ``score(text) -> float``.
        tokenizer: the model's tokenizer.
        environment_factory, tools: see :meth:`from_model_id`.

    Raises:
        MemoryBudgetError: the run cannot fit into this machine's memory.
    """

    def __init__(
        self,
        model: Any,
        config: EggrollConfig,
        reward: Any,
        tokenizer: Any,
        *,
        environment_factory: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
    ) -> None:
        if environment_factory is not None or tools:
            reward = with_world(reward, environment_factory, tools, tokenizer=tokenizer)
        self._hold(worker_of(model, config, reward, tokenizer))

    @classmethod
    def from_model_id(
        cls,
        model: str,
        config: EggrollConfig,
        reward: Any = None,
        *,
        environment_factory: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        workers: int | None = None,
        backend: BackendName = "torch",
        dtype: str = "auto",
        device: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        quantize: Quantize = "auto",
        revision: str | None = None,
        attn_implementation: Attention | None = None,
        **placement: Any,
    ) -> Self:
        """A trainer of a model that is loaded here, in a vLLM engine, or in worker processes.

        ::

            with EggrollTrainer.from_model_id("smollm2-135m", config, score, workers=4) as trainer:
                trainer.evolve(["What is 2+2?", "Explain gravity."])
                trainer.save("./evolved-model")

        Args:
            model: directory, hub id, ``.gguf`` file or alias.
            config: the settings.
            reward: as for the class, or a name for :func:`~eggroll.llm.rewards.load.load_reward`. ``None`` where the
                world or environment scores by itself.
            environment_factory: makes what the model talks to, as for TRL's ``GRPOTrainer``, or a class of
                :class:`~eggroll.llm.worlds.world.World`.
            tools: functions that the model may call, with type hints and docstrings.
            workers: number of processes that score members; ``None`` uses this process alone.
            backend, dtype, device, engine_args, trust_remote_code, quantize, revision, attn_implementation: see
                :class:`~eggroll.llm.backends.build.WorkerFactory`.
            **placement: of workers, see :class:`~eggroll.llm.backends.pool.PoolWorker`.

        Raises:
            ConfigError: settings, backend and workers do not fit each other.
            EggrollError: the model, the reward or the engine cannot be had.
        """
        if "rollout_func" in placement:
            raise ConfigError(
                "rollout_func generates by itself, with one model; a population is generated for all members at once. "
                "Write what it does as a World with reset(row) and step(completion), and give environment_factory"
            )
        if environment_factory is not None or tools or reward is None:
            reward = with_world(reward, environment_factory, tools)
        factory = WorkerFactory(
            model=model, config=config, reward=reward, backend=backend, dtype=dtype, device=device,
            engine_args=engine_args or {}, trust_remote_code=trust_remote_code, quantize=quantize,
            revision=revision, attn_implementation=attn_implementation,
        )  # fmt: skip
        if placement and workers is None:
            raise ConfigError(f"{', '.join(placement)}: these place workers; say how many with workers=N")
        worker: ModelWorker = factory() if workers is None else PoolWorker(factory, workers=workers, **placement)
        trainer = cls.__new__(cls)
        trainer._hold(worker)
        return trainer

    def _hold(self, worker: ModelWorker) -> None:
        self.worker = worker
        self.model, setup = worker.module, worker.setup
        self.config, self.reward, self.tokenizer = setup.config, setup.reward, setup.tokenizer
        self.history: list[dict[str, Any]] = []
        self.interrupted = False
        self.done = 0
        self.kept = Kept.last(0)

    @property
    def evolved(self) -> list[ParameterSpec]:
        """The parameters that are evolved."""
        return list(self.worker.setup.specs)

    def evolve(
        self,
        data: Any,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        *,
        eval_data: Any = None,
        run: RunDir | None = None,
        resume: bool = False,
        listeners: Iterable[Listener] = (),
        keep: Keep = "last",
        patience: int = 0,
    ) -> list[dict[str, Any]]:
        """Run the generations; returns the history: one dict of metrics per generation.

        Args:
            data: prompts or texts (whatever :func:`~eggroll.llm.load_examples` reads), or a ``DataLoader`` (or any
                iterable) of tokenized batches.
            callback: called with each generation's metrics; if it returns ``False``, the run ends.
            eval_data: held-out data in the same forms; the center is scored on it before, during and after.
            run: a run directory for logs and checkpoints.
            resume: continue ``run`` after its last logged generation.
            listeners: further objects with ``generation(metrics)``, such as a live display; their ``message(text)``, if
                they have one, is told how generated code is shut in, why members are evaluated one at a time, and that
                all of them score the same.
            keep: ``best`` leaves the model with the weights of the best score on ``eval_data``, which a checkpoint in
                ``run`` keeps; ``last``, the default, with those of the last generation. ``self.kept`` says whose they
                are, and ``self.done`` is its generation.
            patience: end the run after this many evaluations in a row that do not beat the best; 0 never ends it.

        A trainer goes on where it is: after :meth:`load_checkpoint`, or after a callback or Ctrl-C has ended a run, the
        rest of ``config.generations`` is run. With ``keep="best"`` that is the best generation; ``resume=True`` goes
        on after the last one.

        Raises:
            DataError: the data is empty or of the wrong form.
            RewardError: the reward fails.
            ConfigError: all generations are done already; or ``keep`` or ``patience`` lacks what it needs.
            CheckpointError: the checkpoint of the best generation is damaged.
            RunError: another process is writing to ``run``.
        """
        check_patience(patience, heldout=eval_data is not None, eval_every=self.config.eval_every)
        check_keep(keep, heldout=eval_data is not None, run=run)
        worker, listeners = self.worker, list(listeners)
        worker.use(data, eval_data)
        for note in worker.setup.generation:
            warnings.warn(note, stacklevel=2)
        told = [*self.reward.notes, *([worker.note] if worker.note else [])]
        for listener in listeners:
            if hasattr(listener, "message"):
                for note in told:
                    listener.message(note)
        loop = Loop(
            self.config,
            worker,
            run,
            heldout=eval_data is not None,
            eval_every=self.config.eval_every,
            checkpoint_every=self.config.checkpoint_every,
            listeners=listeners,
            spread_advice=SPREAD_ADVICE,
            keep=keep,
            patience=patience,
            # A callback that has ended this trainer's run is not asked again when it goes on.
            stop=None if callback is None else lambda m: m["generation"] > self.done and callback(m) is False,
        )
        with nullcontext() if run is None else locked(run.path):
            start = loop.resume() if resume else self._start(loop)
            try:
                loop.go(start)
            finally:  # a reward that fails ends the run after the updates before it, which are in the weights
                self.history, self.interrupted, self.done = loop.history, loop.interrupted, loop.applied
                self.kept = Kept.last(self.done, loop.standing, stopped_early=loop.stopped_early)
            if keep == "best" and run is not None and loop.standing.best is not None:
                self._take_best(loop, run)
        if (unscored := unscored_line(self.history)) is not None:
            tellers = [listener.message for listener in listeners if hasattr(listener, "message")]
            for tell in tellers or [partial(warnings.warn, stacklevel=2)]:
                tell(unscored)
        return self.history

    def _take_best(self, loop: Loop, run: RunDir) -> None:
        """Put the weights of the best generation into the model."""
        best = loop.standing.best
        assert best is not None, "asked by evolve()"
        if best[0] != self.done:
            self.worker.load_state_tensors(run.checkpoint_of(best[0]).load())
        self.done, self.kept = best[0], replace(self.kept, saved="best", generation=best[0])

    def _start(self, loop: Loop) -> int:
        if 0 < self.config.generations <= self.done:
            raise ConfigError(
                f"all {self.done} generations of this trainer are done. To go on, make a trainer for the evolved model "
                "with another seed, or load_checkpoint() into one whose config has more generations"
            )
        loop.history = [line for line in self.history if line["generation"] <= self.done]
        loop.standing = Standing([score for score in self.kept.standing.scores if score[0] <= self.done])
        return self.done

    def save(self, directory: str | Path, *, metadata: dict[str, Any] | None = None) -> Path:
        """Write the model as a plain Hugging Face directory that ``from_pretrained`` loads."""
        return self.worker.save(directory, {"generations": self.done, **self.kept.about(), **(metadata or {})})

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Push the model, its tokenizer and its card to the Hugging Face hub; returns the address.

        Args:
            repo_id: ``account/name``, or a name under your own account. Made if it does not exist.
            private: make a new repository private; one that exists stays as it is.

        Raises:
            ModelError: there is no token, or the hub refuses; the message says what to do.
        """
        check_push(repo_id)
        with TemporaryDirectory() as folder:
            place = self.save(Path(folder) / repo_id.rpartition("/")[2])
            advice = f"Call it again, or save() to a directory and push that: {later('DIRECTORY', repo_id)}"
            return push(place, repo_id, private=private, advice=advice)

    def save_checkpoint(self, path: str | Path) -> Path:
        """Write the evolved parameters and the optimizer's state, so that :meth:`load_checkpoint` can go on."""
        run = RunDir.create(path, self.config.to_dict()) if not Path(path).exists() else RunDir.open(path)
        return run.save_checkpoint(self.done, self.worker.state_tensors(), {"config": self.config.to_dict()})

    def load_checkpoint(self, path: str | Path) -> int:
        """Put back what :meth:`save_checkpoint` wrote; returns the number of finished generations.

        Raises:
            RunError: there is no checkpoint.
        """
        checkpoint = RunDir.open(path).latest_checkpoint()
        if checkpoint is None:
            raise RunError(f"{path} holds no checkpoint")
        self.worker.load_state_tensors(checkpoint.load())
        self.done = checkpoint.generation
        self.kept = Kept.last(self.done)
        return self.done

    def cleanup(self) -> None:
        """Free an engine, or end the workers. The trainer cannot be used after that."""
        self.worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()
