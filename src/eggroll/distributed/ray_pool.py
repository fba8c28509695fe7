"""``RayPool``: workers in processes of their own, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Callable

from eggroll._optional import require
from eggroll.distributed.host import Factory
from eggroll.distributed.pool import Pool, check_counts
from eggroll.distributed.ray_actor import RayTransport
from eggroll.distributed.ray_cluster import abandon, connect, death
from eggroll.distributed.ray_place import Place
from eggroll.errors import ConfigError


class RayPool(Pool):
    """Evaluates a generation on many workers and keeps their replicas the same. Results do not depend on how many.

        >>> with RayPool(factory, workers=4, population_size=64) as pool:
        ...     Loop(config, pool).go()

    A worker that dies (a kill, a lost machine) costs the run its range, which another one scores; a new process is
    started and catches up. Workers that have no place in the cluster yet join when there is one.

    Args:
        factory: makes a :class:`~eggroll.loop.Worker`, called in each worker's process.
        workers: how many to start; :meth:`add_worker` adds to them.
        population_size: members of a generation.
        range_size: members that are evaluated together, even; ``None`` derives it from the population alone (a
            sixteenth, 2 to 64). Results may differ in the last bits between different range sizes.
        address: of a Ray cluster: ``"auto"`` or ``"host:port"``. ``None`` takes what ``ray.init`` was given before,
            else ``RAY_ADDRESS``, else starts one on this machine for as long as the pool is open.
        cpus_per_worker: cores that a worker takes and threads that it computes with. More than one thread may change
            the last bits of results; the same number everywhere keeps runs repeatable.
        gpus_per_worker: GPUs that a worker takes, or a part of one. Several are a placement group of the worker's own,
            on one node, and all of them are in its ``CUDA_VISIBLE_DEVICES``.
        across_nodes: that group is a bundle for each GPU, on as few nodes as possible but perhaps on several. The
            worker's process holds no GPU: they are for processes that it starts in the group, as vLLM's Ray executor
            does.
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
        RunError: no worker has a place in time, one dies three times in a row without finishing anything, or the
            cluster itself dies.
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
        across_nodes: bool = False,
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
        _check_whole(gpus_per_worker, across_nodes)
        self._ours = connect(address, workers=workers, cpus=cpus_per_worker, gpus=gpus_per_worker)
        self.closed = False
        try:
            super().__init__(
                RayTransport(factory, Place(cpus_per_worker, gpus_per_worker, across_nodes), death),
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
        workers = [seat.info["pid"] for seat in self._crew.seats() if seat.info]
        super().close()
        if self._ours and death():
            self._ours = False
            abandon(workers)
        self._shutdown()

    def _shutdown(self) -> None:
        if self._ours:
            self._ours = False
            require("ray", extra="ray").shutdown()


def _check_whole(gpus: float, across_nodes: bool) -> None:
    """A part of a GPU can be shared, and nothing above one can."""
    if gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"gpus_per_worker (={gpus:g}) must be a whole number above 1: use {int(gpus)} or {int(gpus) + 1}, or at "
            "most 1 (0.5 puts two workers on one GPU)"
        )
    if across_nodes and (gpus < 1 or gpus != int(gpus)):
        raise ConfigError(
            f"gpus_per_worker (={gpus:g}) must be a whole number of at least 1 when each GPU is a bundle of its own "
            "(across_nodes); a worker without one leaves across_nodes out"
        )
