"""A language model that evolves in many processes, on one machine or on a Ray cluster."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eggroll.core.records import UpdateRecord
from eggroll.distributed import RayPool
from eggroll.distributed.pool import Pool
from eggroll.errors import ConfigError, DataError, RunError
from eggroll.llm.backends.build import BackendName, WorkerFactory, check_anchor, generation_notes
from eggroll.llm.backends.vllm_engine import check_vllm
from eggroll.llm.backends.vllm_parallel import across_nodes, check_parallel
from eggroll.llm.backends.worker import ModelWorker, Setup
from eggroll.llm.data.batches import is_batches
from eggroll.llm.data.examples import Example, load_examples
from eggroll.llm.generation.defaults import GenerationDefaults
from eggroll.llm.models.loading import load_surroundings
from eggroll.llm.models.outline import look_up
from eggroll.llm.rewards.columns import check_columns
from eggroll.llm.rewards.load import as_reward
from eggroll.loop import Evaluation, Heldout


class PoolWorker(ModelWorker):
    """Workers that score members, each with a replica of the model; this process holds none.

    Results do not depend on the number of workers (see ``docs/cluster.md``). What happens to them is told by warnings.

    Args:
        factory: makes each worker; every machine has to find the model and the reward's file. ``dtype="auto"`` is
            decided here, for all workers; ``device="auto"`` takes the GPU that a worker was given, else the CPU.
        workers: processes that score members.
        **placement: ``address``, ``cpus_per_worker``, ``gpus_per_worker``, ``range_size``, ``check_every`` and the
            other arguments of :class:`eggroll.distributed.RayPool`. An engine on several GPUs
            (``tensor_parallel_size``) needs as many ``gpus_per_worker``; they are on one node, or with
            ``distributed_executor_backend="ray"`` perhaps on several.

    Raises:
        ConfigError: settings and backend do not fit, or an engine and the GPUs of a worker.
        ModelError: there is no such model.
    """

    module = None

    def __init__(self, factory: WorkerFactory, *, workers: int, **placement: Any) -> None:
        self.placement = placement_of(factory.backend, factory.engine_args, placement)
        self.workers = workers
        model, config, trust = factory.model, factory.config, factory.trust_remote_code
        place = "cpu" if factory.device == "auto" else factory.device  # of this process, which may have no GPU
        found = look_up(
            model, dtype=factory.dtype, device=place, trust_remote_code=trust, quantize=factory.quantize,
            revision=factory.revision,
        )  # fmt: skip
        check_anchor(config, found.outline)
        vllm = factory.backend == "vllm"
        around = load_surroundings(
            model, trust_remote_code=trust, weights_elsewhere=vllm, gguf=factory.quantize == "gguf",
            revision=factory.revision,
        )  # fmt: skip
        tokenizer = around.tokenizer
        reward = as_reward(factory.reward, tokenizer)
        specs = check_vllm(config, found.outline, reward) if vllm else found.outline.evolved(config)
        defaults = GenerationDefaults.of(around.generation_config, config.temperature)
        self.setup = Setup(
            config, reward, tokenizer, tuple(specs), found.name, found.outline.size, found.dtype,
            f"{workers} worker{'s' if workers != 1 else ''}", found.notes, model, trust,
            generation_notes(reward, defaults, vllm=vllm), quantize=factory.quantize, revision=factory.revision,
        )  # fmt: skip
        self.factory = dataclasses.replace(factory, dtype=found.dtype)
        self._notes = found.notes
        self.pool: Pool | None = None
        self._data: tuple[Any, Any] = (None, None)
        self._state: Mapping[str, Any] | None = None

    def use(self, data: Any, eval_data: Any = None) -> None:
        """Start the workers with the data that they train on and the held-out data, unless they have them already.

        What is learned so far moves to the new workers.

        Raises:
            DataError: the data is tokenized, empty or of the wrong form.
            RewardError: it lacks a column that the reward asks for.
            EggrollError: no cluster at the address, no place for a worker, or what its construction raised.
        """
        if self.pool is not None and self._data[0] is data and self._data[1] is eval_data:
            return
        state = self._state if self.pool is None else self.pool.state_tensors()
        self.close()
        train, heldout = self._examples(data), None if eval_data is None else self._examples(eval_data)
        check_columns(self.setup.reward, train)
        check_columns(self.setup.reward, heldout or train, "the held-out data set")
        factory = dataclasses.replace(self.factory, train=train, heldout=heldout)
        size = self.setup.config.population_size
        self.pool = RayPool(factory, workers=self.workers, population_size=size, **self.placement)
        self._data = (data, eval_data)
        self.setup = dataclasses.replace(self.setup, notes=(*self._notes, self._where()))
        if state is not None:
            self.pool.load_state_tensors(state)

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Let the workers score the members."""
        return self._started().evaluate(generation, sigma, members)

    def heldout(self, generation: int) -> Heldout:
        """The center on the held-out data, scored by one of the workers."""
        return self._started().heldout(generation)

    def apply(self, record: UpdateRecord) -> float:
        """Send an update to all workers; returns the norm of the change."""
        return self._started().apply(record)

    @property
    def update_cosine(self) -> float | None:
        """See :class:`eggroll.loop.Worker`; that of the worker which took the update first."""
        return None if self.pool is None else self.pool.update_cosine

    def state_tensors(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return self._started().state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Put a state into all workers, or keep it for those that will be started."""
        if self.pool is None:
            self._state = tensors
        else:
            self.pool.load_state_tensors(tensors)

    def close(self) -> None:
        """End the workers."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _started(self) -> Pool:
        if self.pool is None:
            raise RunError("there are no workers: none were started by evolve(data), or they were ended")
        return self.pool

    def _examples(self, data: Any) -> list[Example]:
        if is_batches(data):
            raise DataError("workers take prompts or texts (strings or a data set), not tokenized batches")
        return load_examples(data, purpose=self.setup.reward.reads)

    def _where(self) -> str:
        cpus, gpus = self.placement.get("cpus_per_worker", 1), self.placement.get("gpus_per_worker", 0)
        address = self.placement.get("address")
        each = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (f" and {gpus:g} GPU{'s' if gpus > 1 else ''}" if gpus else "")
        where = f"the Ray cluster {address}" if address else "this machine"
        return f"workers on {where}, each with {each} and a replica of the model ({self.factory.backend})"


def placement_of(backend: BackendName, engine_args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the pool, once it is known that the engines fit what their workers are given.

    Raises:
        ConfigError: they do not.
    """
    gpus = given.get("gpus_per_worker", 0)
    if not isinstance(gpus, int | float) or isinstance(gpus, bool):
        return dict(given)  # the pool says what is wrong with it
    if backend == "vllm":
        check_parallel(engine_args, gpus)
        return {"across_nodes": across_nodes(engine_args), **given}
    if gpus > 1:
        raise ConfigError(
            f"a replica in PyTorch computes on one GPU, so with gpus_per_worker (={gpus:g}) the others would be idle; "
            "use --worker-gpus 1 and more --workers, or backend='vllm' for models that need several"
        )
    return dict(given)
