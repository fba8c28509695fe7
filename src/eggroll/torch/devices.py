"""Where tensors live: the device that a setting names."""

from __future__ import annotations

import torch

from eggroll.errors import ConfigError


def find_device(device: str | torch.device) -> torch.device:
    """The device of a setting; ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device (={device!r}) must be auto, cpu, cuda, cuda:1, mps, ...: {error}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device (={str(device)!r}): torch {torch.__version__} sees no CUDA device; use device='cpu'")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device (={str(device)!r}): torch sees {torch.cuda.device_count()} CUDA devices, from cuda:0"
        )
    return place
