"""One run on many processes and machines: members are shared out in ranges, only scores travel.

Names are loaded on first use: importing this package loads neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eggroll.distributed.evolving import evolve as evolve
    from eggroll.distributed.local import LocalPool as LocalPool
    from eggroll.distributed.ray_pool import RayPool as RayPool
    from eggroll.distributed.torch_worker import TorchWorker as TorchWorker
    from eggroll.loop import Worker as Worker

_HOMES = {
    "LocalPool": "eggroll.distributed.local",
    "RayPool": "eggroll.distributed.ray_pool",
    "TorchWorker": "eggroll.distributed.torch_worker",
    "Worker": "eggroll.loop",
    "evolve": "eggroll.distributed.evolving",
}

__all__ = ["LocalPool", "RayPool", "TorchWorker", "Worker", "evolve"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
