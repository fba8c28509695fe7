"""What every command that trains can be told about worker processes."""

from __future__ import annotations

from dataclasses import dataclass

from eggroll.core.settings import setting


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How many processes score members, and where."""

    workers: int | None = setting(None, resume=True)
    """Score members in this many worker processes (Ray), each with a replica. Results do not depend on how many."""
    # What answers there sends pickles, which run code.
    ray_address: str | None = setting(None, resume=True, runs_code=lambda address: address not in (None, "auto"))
    """Use this Ray cluster: auto, or host:port (default: workers on this machine)."""
    worker_cpus: int = setting(1, resume=True)
    """Cores that each worker takes, and threads that it computes with."""
    worker_gpus: float = setting(0, resume=True)
    """GPUs that each worker takes; 0.5 puts two workers on one GPU."""
