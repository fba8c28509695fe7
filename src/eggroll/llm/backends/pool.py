"""A language model's run on many workers: what each of them is made of, and the trainer that drives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eggroll.core.records import UpdateRecord
from eggroll.distributed import RayPool
from eggroll.distributed.partition import default_range_size
from eggroll.distributed.pool import Pool
from eggroll.errors import ConfigError, DataError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example, load_examples
from eggroll.llm.estimate import check_memory
from eggroll.llm.models import loading
from eggroll.llm.models.outline import look_up
from eggroll.llm.remote import RemoteTrainer
from eggroll.llm.rewards import Reward
from eggroll.llm.rewards.load import as_reward
from eggroll.llm.trainer import BatchSource, EggrollTrainer, is_batches
from eggroll.loop import Evaluation, Heldout

BackendName = Literal["torch", "vllm"]


@dataclass(frozen=True)
class WorkerFactory:
    """Everything that a worker is made of; it travels to the worker, which loads the model itself.

    Attributes:
        model: directory, hub id or alias, to be found on every machine.
        config: the settings of the run.
        reward: a name for :func:`eggroll.llm.rewards.load.load_reward`, or a function.
        train: the examples to train on.
        heldout: held-out examples, or ``None``.
        dtype: of the weights, the same everywhere.
        device: as for :func:`eggroll.llm.load`; ``auto`` takes the GPU that a worker was given.
        backend: who generates in each worker.
        engine_args: further arguments of ``vllm.LLM``.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    config: EggrollConfig
    reward: Any
    train: Sequence[Example]
    heldout: Sequence[Example] | None
    dtype: str
    device: str = "auto"
    backend: BackendName = "torch"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __call__(self) -> LanguageWorker:
        """Load the model and make the worker, in its process.

        Raises:
            MemoryBudgetError: there is no room for the model here.
            EggrollError: the model or the reward cannot be loaded here.
        """
        trainer: EggrollTrainer
        if self.backend == "vllm":
            from eggroll.llm.backends.vllm_parallel import worker_engine_args
            from eggroll.llm.vllm_trainer import VllmEggrollTrainer

            size = default_range_size(self.config.population_size)
            trainer = VllmEggrollTrainer(
                self.model,
                self.config,
                self.reward,
                dtype=self.dtype,
                engine_args={"max_loras": size, **worker_engine_args(self.engine_args)},
                trust_remote_code=self.trust_remote_code,
            )
        else:
            found = look_up(self.model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)
            # Other workers may live on this machine, so what counts is the memory that is free.
            check_memory(found.outline, self.config, found.dtype, found.device, free=True)
            loaded = loading.load(
                self.model, dtype=found.dtype, device=found.device, trust_remote_code=self.trust_remote_code
            )
            trainer = EggrollTrainer(loaded.model, self.config, self.reward, loaded.tokenizer)
        return LanguageWorker(trainer, self.train, self.heldout)


class LanguageWorker:
    """A replica of a language model and its share of the members: a :class:`eggroll.distributed.Worker`."""

    def __init__(self, trainer: EggrollTrainer, train: Sequence[Example], heldout: Sequence[Example] | None) -> None:
        self.trainer = trainer
        self.source = BatchSource(list(train), trainer.config, trainer.reward)
        self.heldout = heldout
        trainer.evaluator.choose_mode(self.source.at(0))

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score some members on the generation's batch, which every worker chooses alike."""
        found: Evaluation = self.trainer.evaluator.evaluate(generation, sigma, self.source.at(generation), members)
        return found

    def evaluate_center(self) -> Heldout:
        """The centre on the held-out examples."""
        found: Heldout = self.trainer.evaluator.evaluate_center(self.heldout or [])
        return found

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        return self.trainer.learner.apply(record)

    def state_tensors(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return self.trainer.learner.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`."""
        self.trainer.learner.load_state_tensors(tensors)


class DistributedTrainer(RemoteTrainer):
    """Evolves a language model on many workers; on one machine or on a Ray cluster.

    ::

        with DistributedTrainer("smollm2-135m", EggrollConfig(population_size=64), score, workers=4) as trainer:
            trainer.evolve(["What is 2+2?", "Explain gravity."])
            trainer.save("./evolved-model")

    The driver holds no model; results do not depend on the number of workers (see ``docs/cluster.md``).

    Args:
        model: directory, hub id or alias, to be found on every machine.
        config: the settings.
        reward: a name, a file that every machine has, or a function.
        workers: processes that score members.
        backend: who generates in each: ``torch`` or ``vllm``.
        dtype: of the weights; ``auto`` is decided here, for all workers.
        device: of each worker; ``auto`` takes the GPU that it was given, else the CPU.
        engine_args: further arguments of ``vllm.LLM``. An engine on several GPUs (``tensor_parallel_size``) needs as
            many ``gpus_per_worker``; they are on one node, or with ``distributed_executor_backend="ray"`` perhaps on
            several.
        trust_remote_code: run code that comes with the model.
        **placement: ``address``, ``cpus_per_worker``, ``gpus_per_worker``, ``range_size``, ``check_every`` and the
            other arguments of :class:`eggroll.distributed.RayPool`.

    Raises:
        ConfigError: settings and backend do not fit, or an engine and the GPUs of a worker.
        ModelError: there is no such model.
    """

    def __init__(
        self,
        model: str,
        config: EggrollConfig,
        reward: Any,
        *,
        workers: int,
        backend: BackendName = "torch",
        dtype: str = "auto",
        device: str = "auto",
        engine_args: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        **placement: Any,
    ) -> None:
        placement = _placement(backend, engine_args or {}, placement)
        place = "cpu" if device == "auto" else device  # of the driver, which may have no GPU
        found = look_up(model, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
        around = loading.load_surroundings(model, trust_remote_code=trust_remote_code)
        checked: Reward = as_reward(reward, around.tokenizer)
        if backend == "vllm":
            from eggroll.llm.backends.vllm_engine import check_vllm

            specs = check_vllm(config, found.outline, checked)
        else:
            specs = found.outline.evolved(config)
        super().__init__(model, found, specs, config, checked, around.tokenizer, trust_remote_code=trust_remote_code)
        self.workers, self.placement = workers, placement
        self._parts: dict[str, Any] = {
            "model": model, "config": config, "reward": reward, "dtype": str(found.dtype).removeprefix("torch."),
            "device": device, "backend": backend, "engine_args": dict(engine_args or {}),
            "trust_remote_code": trust_remote_code,
        }  # fmt: skip
        self.pool: Pool | None = None
        self._data: tuple[Any, Any] = (None, None)

    def start(self, data: Any, eval_data: Any = None) -> None:
        """Start the workers with the data that they train on and are held out; :meth:`evolve` does it if need be.

        What is learned so far moves to the new workers.

        Raises:
            EggrollError: no cluster at the address, no place for a worker, or what its construction raised.
        """
        before = None if self.pool is None else self.learner.state_tensors()
        self.cleanup()
        train, heldout = self._examples(data), None if eval_data is None else self._examples(eval_data)
        factory = WorkerFactory(train=train, heldout=heldout, **self._parts)
        size = self.config.population_size
        self.pool = RayPool(factory, workers=self.workers, population_size=size, **self.placement)
        self.learner, self.evaluator = self.pool, _PoolEvaluator(self.pool)
        self._data = (data, eval_data)
        if before is not None:
            self.pool.load_state_tensors(before)

    def evolve(
        self,
        data: Any,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        *,
        eval_data: Any = None,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """As :meth:`EggrollTrainer.evolve`. What happens to workers is told by warnings."""
        if self.pool is None or self._data[0] is not data or self._data[1] is not eval_data:
            self.start(data, eval_data)
        return super().evolve(data, callback, eval_data=eval_data, **options)

    def cleanup(self) -> None:
        """End the workers. The trainer cannot be saved after that."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _examples(self, data: Any) -> list[Example]:
        if is_batches(data):
            raise DataError("workers take prompts or texts (strings or a data set), not tokenised batches")
        texts = all(part.needs == "tokens" for part, _ in self.reward.parts)
        return load_examples(data, purpose="text" if texts else "prompts")


def _placement(backend: BackendName, engine_args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the pool, once it is known that the engines fit what their workers are given."""
    gpus = given.get("gpus_per_worker", 0)
    if not isinstance(gpus, int | float) or isinstance(gpus, bool):
        return dict(given)  # the pool says what is wrong with it
    if backend == "vllm":
        from eggroll.llm.backends.vllm_parallel import across_nodes, check_parallel

        check_parallel(engine_args, gpus)
        return {"across_nodes": across_nodes(engine_args), **given}
    if gpus > 1:
        raise ConfigError(
            f"a replica in PyTorch computes on one GPU, so with gpus_per_worker (={gpus:g}) the others would be idle; "
            "use --worker-gpus 1 and more --workers, or backend='vllm' for models that need several"
        )
    return dict(given)


class _PoolEvaluator:
    """The pool in the place of an evaluator: its workers know the batches."""

    mode_note = ""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def choose_mode(self, batch: Any) -> str:
        return "pool"

    def evaluate(self, generation: int, sigma: float, batch: Any) -> Evaluation:
        return self.pool.evaluate(generation, sigma)

    def evaluate_center(self, batch: Any) -> Heldout:
        return self.pool.heldout()
