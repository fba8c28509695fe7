"""Who evaluates a run of ``eggroll tune``: this process, a vLLM engine, or workers on this and other machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eggroll.cli.tune import TuneOptions
from eggroll.errors import ConfigError
from eggroll.llm.estimate import check_memory
from eggroll.llm.models import loading
from eggroll.llm.models.outline import look_up
from eggroll.llm.rewards.load import load_reward
from eggroll.llm.trainer import EggrollTrainer


@dataclass(frozen=True)
class Backend:
    """A trainer that is ready, and what people want to know about it.

    Attributes:
        trainer: evolves the model.
        name: of the model.
        parameters: of the whole model.
        dtype: of the weights.
        place: where they are.
        notes: what was chosen and why.
        close: frees what the trainer holds outside this process.
    """

    trainer: EggrollTrainer
    name: str
    parameters: int
    dtype: str
    place: str
    notes: tuple[str, ...]
    close: Callable[[], None]


def make_backend(options: TuneOptions, train: Sequence[Any], heldout: Sequence[Any] | None) -> Backend:
    """Load what the options name.

    Raises:
        EggrollError: the model, the reward or the engine cannot be had, or do not fit each other.
    """
    if options.workers is not None:
        return _workers(options, train, heldout)
    for flag in ("ray_address", "worker_cpus", "worker_gpus"):
        if getattr(options, flag) != getattr(TuneOptions, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is for runs on workers; say how many with --workers N")
    return _vllm(options) if options.backend == "vllm" else _torch(options)


def reward_spec(options: TuneOptions) -> str:
    """The reward of a run, as it is named."""
    return options.reward or options.task or "perplexity"


def engine_args(options: TuneOptions) -> dict[str, Any]:
    """``--engine-args`` as a dict.

    Raises:
        ConfigError: it is no JSON object, or the run is not on vLLM.
    """
    if options.engine_args is None:
        return {}
    if options.backend != "vllm":
        raise ConfigError("--engine-args are arguments of vllm.LLM; they need --backend vllm")
    try:
        values = json.loads(options.engine_args)
    except ValueError as error:
        values, reason = None, f": {error}"
    else:
        reason = f", it is a {type(values).__name__}"
    if not isinstance(values, dict):
        raise ConfigError(
            f"--engine-args (={options.engine_args!r}) must be a JSON object{reason}; "
            'for example --engine-args \'{"max_loras": 16, "tensor_parallel_size": 2}\''
        )
    return values


def _torch(options: TuneOptions) -> Backend:
    engine_args(options)
    source, trust = options.model, options.trust_remote_code
    found = look_up(source, dtype=options.dtype, device=options.device, trust_remote_code=trust)
    check_memory(found.outline, options.config(), found.dtype, found.device)
    loaded = loading.load(source, dtype=found.dtype, device=found.device, trust_remote_code=trust)
    reward = load_reward(reward_spec(options), loaded.tokenizer)
    trainer = EggrollTrainer(loaded.model, options.config(), reward, loaded.tokenizer)
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    notes = (*found.notes, *loaded.notes)
    return Backend(trainer, loaded.name, size, _name(loaded.dtype), str(loaded.device), notes, lambda: None)


def _vllm(options: TuneOptions) -> Backend:
    from eggroll.llm.vllm_trainer import VllmEggrollTrainer

    trainer = VllmEggrollTrainer(
        options.model,
        options.config(),
        reward_spec(options),
        dtype=options.dtype,
        engine_args=engine_args(options),
        trust_remote_code=options.trust_remote_code,
    )
    found, slots = trainer.found, trainer.engine.max_loras
    notes = (*found.notes, f"members are LoRA adapters of one vLLM engine, {slots} of them at once")
    place = f"vLLM, {found.device}"
    return Backend(trainer, found.name, found.outline.size, _name(found.dtype), place, notes, trainer.cleanup)


def _workers(options: TuneOptions, train: Sequence[Any], heldout: Sequence[Any] | None) -> Backend:
    from eggroll.llm.backends.pool import DistributedTrainer

    assert options.workers is not None
    trainer = DistributedTrainer(
        options.model,
        options.config(),
        reward_spec(options),
        workers=options.workers,
        backend=options.backend,
        dtype=options.dtype,
        device=options.device,
        engine_args=engine_args(options),
        trust_remote_code=options.trust_remote_code,
        address=options.ray_address,
        cpus_per_worker=options.worker_cpus,
        gpus_per_worker=options.worker_gpus,
    )
    trainer.start(train, heldout)  # now, so that a wrong address is known before there is a run directory
    found = trainer.found
    each = f"{options.worker_cpus} CPU{'s' if options.worker_cpus > 1 else ''}"
    each += f" and {options.worker_gpus:g} GPU{'s' if options.worker_gpus > 1 else ''}" if options.worker_gpus else ""
    where = f"the Ray cluster {options.ray_address}" if options.ray_address else "this machine"
    place = f"{options.workers} worker{'s' if options.workers > 1 else ''}"
    notes = (*found.notes, f"workers on {where}, each with {each} and a replica of the model ({options.backend})")
    return Backend(trainer, found.name, found.outline.size, _name(found.dtype), place, notes, trainer.cleanup)


def _name(dtype: Any) -> Any:
    return str(dtype).removeprefix("torch.")
