"""``RayPool``: workers in processes of their own, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Callable

from eggroll._optional import require
from eggroll.distributed.pool import Pool, check_counts
from eggroll.distributed.ray_actor import RayTransport
from eggroll.distributed.ray_cluster import connect
from eggroll.distributed.worker import Factory


class RayPool(Pool):
    """Evaluates a generation on many workers and keeps their replicas the same. Results do not depend on how many.

        >>> with RayPool(factory, workers=4, population_size=64) as pool:
        ...     Loop(config, learner=pool, evaluate=pool.evaluate).go()

    A worker that dies (a kill, a lost machine) costs the run its range, which another one scores; a new process is
    started and catches up. Workers that have no place in the cluster yet join when there is one.

    Args:
        factory: makes a :class:`~eggroll.distributed.worker.Worker`, called in each worker's process.
        workers: how many to start; :meth:`add_worker` adds to them.
        population_size: members of a generation.
        range_size: members that are evaluated together, even; ``None`` derives it from the population alone (a
            sixteenth, 2 to 64). Results may differ in the last bits between different range sizes.
        address: of a Ray cluster: ``"auto"`` or ``"host:port"``. ``None`` takes what ``ray.init`` was given before,
            else ``RAY_ADDRESS``, else starts one on this machine for as long as the pool is open.
        cpus_per_worker: cores that a worker takes and threads that it computes with. More than one thread may change
            the last bits of results; the same number everywhere keeps runs repeatable.
        gpus_per_worker: GPUs that a worker takes, or a part of one.
        check_every: generations between comparisons of all workers' weights (BLAKE2b of every parameter: about a
            second per gigabyte); 0 for never. A worker that differs gets the lead's weights, with a warning.
        straggler_s: a range that is out for longer than this and than twice the median is given to an idle worker
            too, and the first answer counts; seconds.
        start_timeout_s: how long to wait while no worker at all has a place; seconds.
        notify: told what happens to workers, in sentences; ``None`` warns (``WorkerWarning``, ``DigestWarning``).

    Raises:
        ConfigError: a setting that cannot work, no cluster at the address, a factory that cannot travel.
        MissingExtraError: ray is not installed.
        EggrollError: what the factory raised, with the node's name. A ``MemoryBudgetError`` of some workers only
            leaves those out.
        RunError: no worker has a place in time, or one dies three times in a row without finishing anything.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        workers: int,
        population_size: int,
        range_size: int | None = None,
        address: str | None = None,
        cpus_per_worker: int = 1,
        gpus_per_worker: float = 0,
        check_every: int = 10,
        straggler_s: float = 10.0,
        start_timeout_s: float = 600.0,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        check_counts(
            workers=(workers, 1, True),
            cpus_per_worker=(cpus_per_worker, 1, True),
            gpus_per_worker=(gpus_per_worker, 0, False),
            check_every=(check_every, 0, True),
        )
        self._ours = connect(address, workers=workers, cpus=cpus_per_worker, gpus=gpus_per_worker)
        self.closed = False
        try:
            super().__init__(
                RayTransport(factory, cpus=cpus_per_worker, gpus=gpus_per_worker),
                workers=workers,
                population_size=population_size,
                range_size=range_size,
                check_every=check_every,
                straggler_s=straggler_s,
                start_timeout_s=start_timeout_s,
                notify=notify,
            )
        except BaseException:
            self._shutdown()
            raise

    def close(self) -> None:
        """End all workers, and Ray if it was started for them."""
        super().close()
        self._shutdown()

    def _shutdown(self) -> None:
        if self._ours:
            self._ours = False
            require("ray", extra="ray").shutdown()
