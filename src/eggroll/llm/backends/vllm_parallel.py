"""How many devices a vLLM engine computes on, and whether a worker of a pool is given as many."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from eggroll.errors import ConfigError

SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size")
"""Arguments of ``vllm.LLM`` whose product is the number of its devices."""
EXECUTOR = "distributed_executor_backend"


def check_sizes(engine_args: Mapping[str, Any]) -> None:
    """Refuse sizes of an engine that cannot be.

    Raises:
        ConfigError: one is no positive whole number, or layers are to be shared out among processes: each holds its
            part of every evolved weight, rebuilds all updates, and must come to the same result as the others.
    """
    problems = []
    for name in SIZES:
        size = engine_args.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            problems.append(f"{name} (={size!r}) must be a positive whole number")
        elif name == "pipeline_parallel_size" and size > 1:
            problems.append(
                f"{name} (={size}) must be 1: each process of an engine has to hold a part of every evolved weight, "
                "and not some layers only; use tensor_parallel_size, which divides the heads of the model"
            )
    if problems:
        raise ConfigError.from_problems("engine_args", problems)


def check_parallel(engine_args: Mapping[str, Any], gpus: float) -> None:
    """Refuse an engine that needs other GPUs than its worker is given.

    An engine without GPUs computes on the CPU, in as many processes as it likes; where the vLLM that is installed here
    is no CPU build, that cannot be meant.

    Args:
        engine_args: arguments of ``vllm.LLM``.
        gpus: GPUs of each worker.

    Raises:
        ConfigError: they do not match, or a size cannot be.
    """
    check_sizes(engine_args)
    sizes = {name: engine_args[name] for name in SIZES if name in engine_args}
    devices = device_count(engine_args)
    by_ray = engine_args.get(EXECUTOR) == "ray"
    if by_ray and gpus < 1:
        raise ConfigError(
            f'engine_args {EXECUTOR}="ray" gives each of the engine\'s processes a GPU, and a worker has '
            f"gpus_per_worker (={gpus:g}); use --worker-gpus {devices}, or leave {EXECUTOR} out"
        )
    if gpus == devices or (gpus < 1 and devices == 1) or (gpus == 0 and _on_cpu()):
        return
    product = " x ".join(f"{name} (={size})" for name, size in sizes.items()) or "tensor_parallel_size (=1)"
    other = ""
    if gpus > 1 and float(gpus).is_integer():
        other = f""", or an engine on all of them: --engine-args '{{"tensor_parallel_size": {gpus:g}}}'"""
    raise ConfigError(
        f"an engine with {product} computes on {devices} GPU{'s' if devices > 1 else ''}, and each worker is given "
        f"gpus_per_worker (={gpus:g}); use --worker-gpus {devices}{other}"
    )


def worker_engine_args(engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """An engine's arguments in a worker.

    In a placement group vLLM would choose its Ray executor, which wants a bundle for each GPU; the group of an engine
    that fits on one node is one bundle, all of which the worker holds, so the engine's processes are its own.
    """
    return {EXECUTOR: "mp", **engine_args} if device_count(engine_args) > 1 else dict(engine_args)


def across_nodes(engine_args: Mapping[str, Any]) -> bool:
    """Whether the engine's processes are actors of Ray, each in a bundle with one GPU, on whatever node."""
    return engine_args.get(EXECUTOR) == "ray"


def device_count(engine_args: Mapping[str, Any]) -> int:
    """Processes of the engine, each with a device of its own."""
    count = 1
    for name in SIZES:
        count *= int(engine_args.get(name, 1))
    return count


def _on_cpu() -> bool:
    """Whether vLLM computes on the CPU, as far as is known here: it may only be installed where the workers are."""
    try:
        return "+cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True
