"""Workers from a model's name or from a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from eggroll.distributed.partition import default_range_size
from eggroll.errors import ConfigError
from eggroll.llm.backends.scoring import eos_ids
from eggroll.llm.backends.torch import TorchEvaluator, replica_for
from eggroll.llm.backends.vllm import VllmEvaluator
from eggroll.llm.backends.vllm_engine import VllmEngine, check_vllm
from eggroll.llm.backends.vllm_parallel import worker_engine_args
from eggroll.llm.backends.worker import LanguageWorker, ModelWorker, Setup
from eggroll.llm.config import Attention, EggrollConfig, Quantize
from eggroll.llm.data.examples import Example
from eggroll.llm.estimate.machine import check_memory
from eggroll.llm.generation.defaults import GenerationDefaults
from eggroll.llm.models.loading import ensure_pad_token, load, load_surroundings
from eggroll.llm.models.outline import Outline, look_up
from eggroll.llm.rewards import Reward
from eggroll.llm.rewards.load import as_reward
from eggroll.torch.anchor import refusal

BackendName = Literal["torch", "vllm"]


@dataclass(frozen=True, kw_only=True)
class WorkerFactory:
    """Makes the worker of a model that is named, in this process or in the one that it travels to.

    Attributes:
        model: directory, hub id, ``.gguf`` file or alias.
        config: the settings.
        reward: as for :func:`~eggroll.llm.rewards.load.as_reward`.
        backend: who generates: ``torch``, or a ``vllm`` engine whose own weights are evolved in place and whose
            adapters are the members (rewards of text, matrices of linear layers). The engine runs in this process,
            unless ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` is set.
        dtype: of the weights; ``auto`` takes the faster of float32 and bfloat16 here.
        device: of the weights in PyTorch.
        engine_args: further arguments of ``vllm.LLM``.
        trust_remote_code: run code that comes with the model.
        quantize, revision, attn_implementation: as for :func:`eggroll.llm.load`.
        train: the examples to train on, for a worker among others; ``None`` leaves the data to ``use``.
        heldout: held-out examples.
    """

    model: str
    config: EggrollConfig
    reward: Any
    backend: BackendName = "torch"
    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    quantize: Quantize = "auto"
    revision: str | None = None
    attn_implementation: Attention | None = None
    train: Sequence[Example] | None = None
    heldout: Sequence[Example] | None = None

    def __call__(self) -> LanguageWorker:
        """Load the model and make the worker.

        Raises:
            ConfigError: the settings or the reward do not fit vLLM; nothing has been loaded then.
            MissingExtraError: vLLM is not installed.
            MemoryBudgetError: there is no room for the run.
            EggrollError: the model or the reward cannot be loaded.
        """
        worker = self._vllm() if self.backend == "vllm" else self._torch()
        if self.train is not None:
            worker.use(list(self.train), None if self.heldout is None else list(self.heldout))
        return worker

    def _torch(self) -> LanguageWorker:
        trust, form = self.trust_remote_code, self.quantize
        how: dict[str, Any] = {
            "trust_remote_code": trust, "quantize": form, "revision": self.revision,
            "attn_implementation": self.attn_implementation,
        }  # fmt: skip
        found = look_up(self.model, dtype=self.dtype, device=self.device, **how)
        check_anchor(self.config, found.outline)
        # Other workers may live on this machine, so what counts then is the memory that is free.
        check_memory(found.outline, self.config, found.dtype, found.device, free=self.train is not None)
        reward = as_reward(self.reward, None)  # before the weights, which may take minutes
        loaded = load(self.model, dtype=found.dtype, device=found.device, **how)
        worker = worker_of(loaded.model, self.config, reward, loaded.tokenizer)
        notes = tuple(dict.fromkeys((*found.notes, *loaded.notes)))
        worker.setup = replace(
            worker.setup, name=loaded.name, notes=notes, base=self.model, trust_remote_code=trust, quantize=form,
            revision=self.revision,
        )  # fmt: skip
        return worker

    def _vllm(self) -> LanguageWorker:
        config, trust, arguments = self.config, self.trust_remote_code, dict(self.engine_args)
        found = look_up(
            self.model, dtype=self.dtype, trust_remote_code=trust, quantize=self.quantize, revision=self.revision
        )
        if found.outline.bits:
            raise ConfigError(
                f"the weights of {self.model} are quantized (quantize={self.quantize!r}), which needs backend='torch': "
                "updates move their codes, and vLLM repacks these for its kernels and does not give them out"
            )
        if self.attn_implementation is not None:
            raise ConfigError(
                f"attn_implementation (={self.attn_implementation!r}) needs backend='torch': vLLM has attention of its "
                "own; leave it out"
            )
        if self.revision is not None:
            arguments = {"revision": self.revision, "tokenizer_revision": self.revision, **arguments}
        if self.train is not None:
            arguments = {"max_loras": default_range_size(config.population_size), **worker_engine_args(arguments)}
        if trust:
            arguments = {"trust_remote_code": True, **arguments}
        around = load_surroundings(self.model, trust_remote_code=trust, revision=self.revision)
        tokenizer, reward = around.tokenizer, as_reward(self.reward, around.tokenizer)
        specs = check_vllm(config, found.outline, reward)
        defaults = GenerationDefaults.of(around.generation_config, config.temperature)
        engine = VllmEngine(
            around.location, config, specs, dtype=found.dtype, outline=found.outline, engine_args=arguments
        )
        ends = eos_ids(around.generation_config, around.config, tokenizer)
        evaluator = VllmEvaluator(engine, tokenizer, reward, config, ends, defaults)
        notes = (*found.notes, f"members are LoRA adapters of one vLLM engine, {engine.max_loras} of them at once")
        setup = Setup(
            config, reward, tokenizer, tuple(specs), found.name, found.outline.size, found.dtype,
            f"vLLM, {found.device}", notes, self.model, trust, generation_notes(reward, defaults, vllm=True),
            revision=self.revision,
        )  # fmt: skip
        return LanguageWorker(setup, evaluator, engine)


def worker_of(module: Any, config: EggrollConfig, reward: Any, tokenizer: Any) -> LanguageWorker:
    """A worker in PyTorch of a module that is there already; it is evolved in place.

    Raises:
        MemoryBudgetError: the run cannot fit into this machine's memory.
        RewardError: the reward cannot be loaded.
    """
    checked = as_reward(reward, tokenizer)
    ensure_pad_token(tokenizer, module)
    module = module.eval()
    first = next(module.parameters())
    check_memory(Outline.of(module), config, first.dtype, first.device)
    replica = replica_for(module, config)
    evaluator = TorchEvaluator(replica.population, tokenizer, checked, config)
    size = sum(parameter.numel() for parameter in module.parameters())
    setup = Setup(
        config, checked, tokenizer, tuple(replica.population.specs), type(module).__name__, size, first.dtype,
        str(first.device), generation=generation_notes(checked, evaluator.defaults),
    )  # fmt: skip
    return LanguageWorker(setup, evaluator, replica, module)


def check_anchor(config: EggrollConfig, outline: Outline) -> None:
    """Refuse a pull towards the start weights where those are quantized, before anything is loaded.

    Raises:
        ConfigError: they are.
    """
    quantized = [spec.name for spec in outline.evolved(config) if spec.name in outline.bits]
    if config.anchored_weight_decay and quantized:
        raise ConfigError(refusal(config.anchored_weight_decay, quantized))


def with_population(worker: ModelWorker, config: EggrollConfig) -> LanguageWorker:
    """A worker in PyTorch of the same module, before its first update, with a population of another size or batch.

    Raises:
        MemoryBudgetError: the run cannot fit into this machine's memory.
    """
    setup = worker.setup
    made = worker_of(worker.module, config, setup.reward, setup.tokenizer)
    made.setup = replace(setup, config=config)
    return made


def generation_notes(reward: Reward, defaults: GenerationDefaults, *, vllm: bool = False) -> tuple[str, ...]:
    """What is to be said about the model's generation config, if the reward reads text that is generated."""
    return tuple(defaults.notes(vllm=vllm)) if any(part.needs == "text" for part, _ in reward.parts) else ()
