"""``evolve``: a run on a pool of workers, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eggroll.core.config import ESConfig
from eggroll.distributed.host import Factory
from eggroll.distributed.local import LocalPool
from eggroll.distributed.pool import Pool
from eggroll.distributed.ray_pool import RayPool
from eggroll.errors import ConfigError
from eggroll.loop import Listener, Loop
from eggroll.run.lock import locked
from eggroll.run.run_dir import RunDir


@dataclass(frozen=True)
class Evolved:
    """What a run leaves in memory.

    Attributes:
        history: one dict of metrics per generation.
        state: the state after the last update, on the CPU, as a checkpoint holds it.
        interrupted: Ctrl-C or SIGTERM ended the run early.
    """

    history: list[dict[str, Any]]
    state: dict[str, Any]
    interrupted: bool

    @property
    def parameters(self) -> dict[str, Any]:
        """The evolved parameters by name: ``model.load_state_dict(found.parameters, strict=False)``."""
        prefix = "parameter/"
        return {name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}


def evolve(
    factory: Factory,
    config: ESConfig,
    *,
    workers: int = 1,
    run: RunDir | str | Path | None = None,
    resume: bool = False,
    heldout: bool = False,
    eval_every: int = 10,
    checkpoint_every: int = 10,
    listeners: Iterable[Listener] = (),
    callback: Callable[[dict[str, Any]], Any] | None = None,
    local: bool = False,
    range_size: int | None = None,
    check_every: int = 10,
    notify: Callable[[str], None] | None = None,
    **placement: Any,
) -> Evolved:
    """Run ``config.generations`` generations on ``workers`` workers.

        >>> found = evolve(lambda: TorchWorker(make_model, fitness, config), config, workers=4, run="runs/cluster")

    Args:
        factory: makes a :class:`~eggroll.loop.Worker`, in each worker's process.
        config: the settings of the algorithm, the same as the workers'.
        workers: processes.
        run: a run directory, or where to make one; ``None`` keeps nothing on disk.
        resume: go on with the run in that directory.
        heldout: score the center on held-out data before, during and after.
        eval_every: generations between those scores.
        checkpoint_every: generations between checkpoints.
        listeners: told of each generation's metrics; their ``message(text)``, if they have one, of what happens to
            workers (as ``notify`` is).
        callback: called with each generation's metrics; if it returns ``False``, the run ends.
        local: workers in this process, without ray: for a debugger.
        range_size: see :class:`RayPool`, as for everything that follows.
        check_every: generations between comparisons of all workers' weights.
        notify: told what happens to workers.
        **placement: ``address``, ``cpus_per_worker``, ``gpus_per_worker``, ``straggler_s``, ``start_timeout_s``.

    Raises:
        EggrollError: see :class:`RayPool` and :class:`eggroll.run.run_dir.RunDir`.
    """
    if resume and run is None:
        raise ConfigError("resume=True needs run, the directory of the run to go on with")
    if local and placement:
        raise ConfigError(f"local=True starts no processes, so {', '.join(placement)} cannot be used; leave them out")
    listeners = list(listeners)
    tellers = [*([notify] if notify else []), *(one.message for one in listeners if hasattr(one, "message"))]

    def tell(text: str) -> None:
        for teller in tellers:
            teller(text)

    shared = {
        "workers": workers,
        "population_size": config.population_size,
        "range_size": range_size,
        "check_every": check_every,
        "notify": tell if tellers else None,
    }
    make: type[Pool] = LocalPool if local else RayPool
    with make(factory, **shared, **placement) as pool:  # type: ignore[arg-type]
        directory = run if run is None or isinstance(run, RunDir) else _directory(run, config, resume)
        loop = Loop(
            config=config,
            worker=pool,
            run=directory,
            heldout=heldout,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            listeners=listeners,
            stop=None if callback is None else lambda metrics: callback(metrics) is False,
        )
        with nullcontext() if directory is None else locked(directory.path):
            history = loop.go(loop.resume() if resume else 0)
        return Evolved(history, {name: value.clone() for name, value in pool.state_tensors().items()}, loop.interrupted)


def _directory(path: str | Path, config: ESConfig, resume: bool) -> RunDir:
    if not resume:
        return RunDir.create(path, config.to_dict())
    run = RunDir.open(path)
    run.check_config(config.to_dict(), may_change=("generations",))
    return run
