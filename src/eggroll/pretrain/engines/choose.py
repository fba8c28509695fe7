"""Which engine runs a model: :func:`make_engine` picks one for the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from eggroll.errors import ConfigError
from eggroll.pretrain.engines import library
from eggroll.pretrain.engines.base import Backend, Engine, run_center
from eggroll.pretrain.engines.c import CEngine
from eggroll.pretrain.engines.torch import TorchEngine
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.oracle import check_state, check_tokens
from eggroll.pretrain.model.shape import ModelShape
from eggroll.torch.devices import find_device


def make_engine(
    params: Mapping[str, NDArray[np.int8]],
    noise: Noise | None = None,
    *,
    sigma_shift: int = 4,
    backend: Backend = "auto",
    threads: int | None = None,
    chunk: int | None = None,
    device: str = "cpu",
) -> Engine:
    """An engine for a model.

    Args:
        params: int8 arrays as in :func:`eggroll.pretrain.model.oracle.forward`; copied.
        noise: where draws come from; without it only the model itself can be run.
        sigma_shift: perturbations have a standard deviation of ``2^-sigma_shift``, where weights have 1.
        backend: ``c`` (CPUs with AVX2 or AVX-512 VNNI, and a compiler), ``torch``, or whichever is the fastest here.
        threads: of the CPU; ``None`` is PyTorch's number.
        chunk: members at once; ``None`` chooses. Results do not depend on it.
        device: of PyTorch, for ``torch``.

    Raises:
        ConfigError: the backend is unknown, or cannot be used here.
        ModelError: the parameters do not make a model.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend (={backend!r}) must be one of: {', '.join(get_args(Backend))}")
    if chunk is not None and chunk < 1:
        raise ConfigError(f"chunk (={chunk}) must be at least 1 member")
    shape = ModelShape.of(params)
    noise = noise or Noise()
    noise.check(shape)
    own = {p.name: np.array(params[p.name], np.int8, order="C") for p in shape.parameters}
    if backend != "torch" and device == "cpu":
        found = library.load()
        if not isinstance(found, str):
            return CEngine(found, own, shape, noise, sigma_shift, threads, chunk)
        if backend == "c":
            raise ConfigError(f"backend='c' cannot be used here: {found}; use backend='torch'")
    elif backend == "c":
        raise ConfigError(f"backend='c' runs on the CPU, not on {device}; use backend='torch'")
    if use_triton(device):
        from eggroll.pretrain.engines.triton import TritonEngine

        return TritonEngine(own, shape, noise, sigma_shift, device, chunk)
    return TorchEngine(own, shape, noise, sigma_shift, device, chunk)


def choose_device(backend: Backend, device: str) -> str:
    """The device that a setting means: with ``auto`` the CPU if it multiplies bytes, else a GPU if there is one.

    Raises:
        ConfigError: there is no such device here.
    """
    if device != "auto":
        find_device(device)
        return device
    if backend == "c" or not torch.cuda.is_available():
        return "cpu"
    return "cuda" if backend == "torch" or not library.multiplies_bytes() else "cpu"


def use_triton(device: str) -> bool:
    """Whether the forward pass is the Triton kernel: on CUDA devices, where Triton is installed."""
    return device.partition(":")[0] == "cuda" and importlib.util.find_spec("triton") is not None


def forward(
    params: Mapping[str, NDArray[np.int8]], tokens: NDArray[Any], state: NDArray[np.int8] | None = None, **settings: Any
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """:func:`eggroll.pretrain.model.oracle.forward` by the fast engine; ``settings`` are those of :func:`make_engine`.

    Args:
        params: int8 arrays by name.
        tokens: ``(T,)``.
        state: ``(L, D)`` int8, or ``None`` for zeros.
        **settings: ``backend``, ``threads``, ``device``.

    Returns:
        Logits ``(T, V)`` and state ``(L, D)``, int8.
    """
    engine = make_engine(params, **settings)
    ids = check_tokens(tokens, engine.shape.vocab).astype(np.uint8)
    before = None if state is None else check_state(state, engine.shape)[None]
    found = run_center(engine, np.append(ids, np.uint8(0))[None], before, outputs=("logits", "state"))
    assert found.logits is not None
    assert found.state is not None
    return found.logits[0], found.state[0]
