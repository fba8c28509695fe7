"""Workers from a model's name or from a module, in this process or in another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from eggroll.distributed.partition import default_range_size
from eggroll.llm.backends.scoring import eos_ids
from eggroll.llm.backends.torch import TorchEvaluator, replica_for
from eggroll.llm.backends.vllm import VllmEvaluator
from eggroll.llm.backends.vllm_engine import VllmEngine, check_vllm
from eggroll.llm.backends.vllm_parallel import worker_engine_args
from eggroll.llm.backends.worker import LanguageWorker, Setup
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example
from eggroll.llm.estimate.machine import check_memory
from eggroll.llm.models.loading import load, load_surroundings
from eggroll.llm.models.outline import Outline, look_up
from eggroll.llm.rewards.load import as_reward

BackendName = Literal["torch", "vllm"]


def worker_of(
    module: Any,
    config: EggrollConfig,
    reward: Any,
    tokenizer: Any,
    *,
    name: str = "",
    base: str | None = None,
    notes: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> LanguageWorker:
    """A worker in PyTorch of a module that is there; the module is evolved in place.

    Args:
        module: a model with a generation head.
        config: the settings.
        reward: as for :func:`~eggroll.llm.rewards.load.as_reward`.
        tokenizer: the model's.
        name: of the model, for people.
        base: what the module was loaded from.
        notes: what was chosen while it was loaded.
        trust_remote_code: its code came with it.

    Raises:
        MemoryBudgetError: the run cannot fit into this machine's memory.
        RewardError: the reward cannot be loaded.
    """
    checked = as_reward(reward, tokenizer)
    if getattr(tokenizer, "pad_token_id", None) is None:
        tokenizer.pad_token = tokenizer.eos_token
    module = module.eval()
    first = next(module.parameters())
    check_memory(Outline.of(module), config, first.dtype, first.device)
    replica = replica_for(module, config)
    evaluator = TorchEvaluator(replica.population, tokenizer, checked, config)
    size = sum(parameter.numel() for parameter in module.parameters())
    setup = Setup(
        config, checked, tokenizer, tuple(replica.population.specs), name or type(module).__name__, size, first.dtype,
        str(first.device), tuple(notes), base, trust_remote_code,
    )  # fmt: skip
    return LanguageWorker(setup, evaluator, replica, module)


def torch_worker(
    model: str,
    config: EggrollConfig,
    reward: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    shared: bool = False,
) -> LanguageWorker:
    """A worker in PyTorch of a model that is loaded here.

    Args:
        model: directory, hub id, ``.gguf`` file or alias.
        config: the settings.
        reward: as for :func:`~eggroll.llm.rewards.load.as_reward`.
        dtype: of the weights.
        device: where they go.
        trust_remote_code: run code that comes with the model.
        shared: other workers may live on this machine, so what counts is the memory that is free.

    Raises:
        MemoryBudgetError: there is no room for the run.
        EggrollError: the model or the reward cannot be loaded.
    """
    found = look_up(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_memory(found.outline, config, found.dtype, found.device, free=shared)
    loaded = load(model, dtype=found.dtype, device=found.device, trust_remote_code=trust_remote_code)
    return worker_of(
        loaded.model, config, reward, loaded.tokenizer, name=loaded.name, base=model,
        notes=(*found.notes, *loaded.notes), trust_remote_code=trust_remote_code,
    )  # fmt: skip


def vllm_worker(
    model: str,
    config: EggrollConfig,
    reward: Any,
    *,
    dtype: str | torch.dtype = "auto",
    engine_args: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> LanguageWorker:
    """A worker whose weights are in a vLLM engine: the engine's own are evolved in place, members are adapters.

    The engine runs in this process, unless ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` is set.

    Args:
        model: directory, hub id or alias.
        config: the settings.
        reward: a reward of text, as for :func:`~eggroll.llm.rewards.load.as_reward`.
        dtype: of the weights.
        engine_args: further arguments of ``vllm.LLM``.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: the settings or the reward do not fit vLLM; nothing has been loaded then.
        MissingExtraError: vLLM is not installed.
        MemoryBudgetError, ModelError: the engine does not start.
    """
    trust = trust_remote_code
    found = look_up(model, dtype=dtype, trust_remote_code=trust)
    around = load_surroundings(model, trust_remote_code=trust)
    checked = as_reward(reward, around.tokenizer)
    specs = check_vllm(config, found.outline, checked)
    arguments = {"trust_remote_code": True, **(engine_args or {})} if trust else engine_args
    engine = VllmEngine(around.location, config, specs, dtype=found.dtype, outline=found.outline, engine_args=arguments)
    ends = eos_ids(around.generation_config, around.config, around.tokenizer)
    notes = (*found.notes, f"members are LoRA adapters of one vLLM engine, {engine.max_loras} of them at once")
    setup = Setup(
        config, checked, around.tokenizer, tuple(specs), found.name, found.outline.size, found.dtype,
        f"vLLM, {found.device}", notes, model, trust,
    )  # fmt: skip
    return LanguageWorker(setup, VllmEvaluator(engine, around.tokenizer, checked, config, ends), engine)


@dataclass(frozen=True)
class WorkerFactory:
    """Everything that a worker is made of; it travels to the worker's process, which loads the model itself.

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
        dtype, trust = self.dtype, self.trust_remote_code
        if self.backend == "vllm":
            arguments = worker_engine_args(self.engine_args)
            arguments = {"max_loras": default_range_size(self.config.population_size), **arguments}
            worker = vllm_worker(
                self.model, self.config, self.reward, dtype=dtype, engine_args=arguments, trust_remote_code=trust
            )
        else:
            worker = torch_worker(
                self.model, self.config, self.reward, dtype=dtype, device=self.device, trust_remote_code=trust,
                shared=True,
            )  # fmt: skip
        worker.use(list(self.train), None if self.heldout is None else list(self.heldout))
        return worker
