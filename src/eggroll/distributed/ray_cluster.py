"""Connecting to a Ray cluster, or starting one in this machine, quietly."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eggroll._optional import require
from eggroll.distributed.ray_address import HOW, check_address
from eggroll.errors import ConfigError, RunError
from eggroll.run.provenance import cores

LIMITS = {"health_check_period_ms": 5_000, "health_check_timeout_ms": 60_000, "health_check_failure_threshold": 10}
"""When Ray takes a node for dead: one that does not answer, after 10 minutes (by default, under a minute, which a busy
machine takes at times); one that is not there any more, after 50 s. There is only this machine's node: that its process
is there is seen at once (:func:`death`)."""
NICENESS = {"worker_niceness": 0}
"""By default, workers give way to everything else on the machine (niceness 15), as if nobody waited for them."""

STARTS = 4
"""Attempts to start a cluster."""
ESSENTIAL = {"raylet": "raylet", "gcs_server": "GCS server"}
"""Processes without which a cluster is no more."""


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
        RunError: none can be started here.
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
        settings["_system_config"] = system_config()
    else:
        check_address(address)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == "local":
            _start(ray, settings)
        else:
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


def system_config() -> dict[str, int]:
    """Ray's own settings for a cluster on this machine; what the user has set (``RAY_health_check_timeout_ms=...``)
    stays."""
    return {name: value for name, value in (LIMITS | NICENESS).items() if f"RAY_{name}" not in os.environ}


def death() -> str:
    """What ended the cluster that this process has started, such as ``its raylet (pid 4711) was killed by SIGKILL``;
    empty while it lives, or where another process has started it.

    Ray itself notices much later, and then ends this process without a word.
    """
    for kind, process in _processes():
        status = process.poll()
        if kind in ESSENTIAL and status is not None:
            by = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
            return f"its {ESSENTIAL[kind]} (pid {process.pid}) {by}"
    return ""


def abandon(workers: Sequence[int]) -> None:
    """End what is left of a dead cluster, and Ray in this process.

    Args:
        workers: process ids of its workers.
    """
    for _, process in _processes():
        with suppress(OSError):
            process.kill()
    for pid in workers:
        with suppress(OSError):  # without a raylet, nobody else ends them
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                os.kill(pid, signal.SIGKILL)
    require(
        "ray", extra="ray"
    ).shutdown()  # takes seconds; with half a cluster, it would wait and then end this process


def _processes() -> list[tuple[str, Any]]:
    """What Ray runs for the cluster that this process has started: kinds and ``Popen``s. There is no public name."""
    with suppress(Exception):
        node = require("ray._private.worker", extra="ray")._global_node
        return [(kind, info.process) for kind, infos in node.all_processes.items() for info in infos]
    return []


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _start(ray: Any, settings: dict[str, Any]) -> None:
    """Start a cluster. Ray gives its processes 30 s and no setting for it, which is too short on a busy machine."""
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", **settings)
            return
        except ValueError:  # a setting of the user's that Ray does not take
            raise
        except (Exception, SystemExit) as error:
            with suppress(Exception):
                ray.shutdown()
            if isinstance(error, SystemExit) and error.code == signal.SIGTERM:  # meant for this process
                raise
            if not left:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise RunError(
                    f"Ray could not be started on this machine in {STARTS} attempts ({reason}). It may be too busy, or "
                    "short of memory or processes: try again when it is quieter, or leave --workers (workers=) out"
                ) from error


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
