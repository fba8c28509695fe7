"""One run on many processes and machines: members are shared out in ranges, only scores travel.

Names are loaded on first use: importing this package loads neither torch nor ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eggroll._lazy import attach

if TYPE_CHECKING:
    from eggroll.distributed.evolving import evolve as evolve
    from eggroll.distributed.local import LocalPool as LocalPool
    from eggroll.distributed.ray_pool import RayPool as RayPool
    from eggroll.distributed.torch_worker import TorchWorker as TorchWorker
    from eggroll.loop import Worker as Worker

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LocalPool": "eggroll.distributed.local",
        "RayPool": "eggroll.distributed.ray_pool",
        "TorchWorker": "eggroll.distributed.torch_worker",
        "Worker": "eggroll.loop",
        "evolve": "eggroll.distributed.evolving",
    },
    extra="torch",
)
