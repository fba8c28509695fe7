"""Connecting to a Ray cluster, or starting one in this machine, quietly."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import Any

from eggroll._optional import require
from eggroll.distributed.ray_address import HOW, check_address
from eggroll.errors import ConfigError
from eggroll.run.provenance import cores


def connect(address: str | None, *, workers: int, cpus: int, gpus: float) -> bool:
    """Make sure that this process is connected to a cluster. Returns whether one was started, to be shut down later.

    Args:
        address: ``"auto"`` (the cluster that this machine is part of), ``"host:port"``, or ``None``: what ``ray.init``
            was given before, else ``RAY_ADDRESS``, else a new one on this machine.
        workers: how many are to have a place in a new one.
        cpus: cores of each.
        gpus: GPUs of each.

    Raises:
        ConfigError: there is no cluster at the address, or this machine has too few GPUs.
        MissingExtraError: ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # answers that nobody waits for any more
    ray = require("ray", extra="ray")
    if ray.is_initialized():
        _check_same(ray, address)
        return False
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        # More workers than cores is what was asked for, so there is room for them, if not speed.
        settings |= {"include_dashboard": False, "num_cpus": max(cores(), workers * cpus)}
    else:
        check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, ValueError, RuntimeError, OSError, SystemExit) as error:  # it may end the process
        with suppress(Exception):
            ray.shutdown()
        if address == "local":
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"no Ray cluster at address={address!r} ({reason}). {HOW}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process in the middle of anything
    _hush()
    has = float(ray.cluster_resources().get("GPU", 0))
    if address == "local" and gpus * workers > has:
        ray.shutdown()
        raise ConfigError(
            f"{workers} workers with {gpus:g} GPU each need {gpus * workers:g} GPUs, this machine has {has:g}; use "
            f"fewer workers, a smaller share (0.5 puts two on a GPU), 0, or the address of a cluster"
        )
    return address == "local"


def _check_same(ray: Any, address: str | None) -> None:
    connected = ray.get_runtime_context().gcs_address
    if address not in (None, "auto", "local", connected):
        raise ConfigError(
            f"this process is connected to the Ray cluster at {connected} already, so it cannot use address="
            f"{address!r}; call ray.shutdown() first, or leave the address out"
        )


def _hush() -> None:
    """Ray prints a paragraph for each worker that dies, into whatever display there is. The pool says it in a line.

    ``log_to_driver=False`` does not cover it, and there is no setting that does.
    """
    with suppress(Exception):
        worker: Any = require("ray._private.worker", extra="ray")
        if callable(worker.print_to_stdstream):
            worker.print_to_stdstream = lambda *args, **more: None
