"""Who evaluates a run of ``eggroll tune``: this process, a vLLM engine, or workers on this and other machines."""

from __future__ import annotations

import json
from typing import Any

from eggroll.cli.tune import TuneOptions
from eggroll.errors import ConfigError
from eggroll.llm.trainer import EggrollTrainer


def make_trainer(options: TuneOptions) -> EggrollTrainer:
    """A trainer of what the options name.

    Raises:
        EggrollError: the model, the reward or the engine cannot be had, or do not fit each other.
    """
    placement: dict[str, Any] = {}
    if options.workers is not None:
        placement = {"address": options.ray_address, "cpus_per_worker": options.worker_cpus}
        placement["gpus_per_worker"] = options.worker_gpus
    else:
        for flag in ("ray_address", "worker_cpus", "worker_gpus"):
            if getattr(options, flag) != getattr(TuneOptions, flag):
                raise ConfigError(f"--{flag.replace('_', '-')} is for runs on workers; say how many with --workers N")
    return EggrollTrainer.from_model_id(
        options.model,
        options.config(),
        reward_spec(options),
        backend=options.backend,
        workers=options.workers,
        dtype=options.dtype,
        device=options.device,
        engine_args=engine_args(options),
        trust_remote_code=options.trust_remote_code,
        **placement,
    )


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
