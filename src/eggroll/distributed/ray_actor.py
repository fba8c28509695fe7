"""The process behind a worker in a Ray cluster, and how messages reach it."""

from __future__ import annotations

import os
import platform
import re
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eggroll._optional import require
from eggroll.distributed.host import Factory, Host, StateLostError, TakenBackError, check_taken_back, set_threads
from eggroll.distributed.ray_place import Place, release
from eggroll.distributed.state import Packed
from eggroll.distributed.transport import WorkerLostError
from eggroll.errors import ConfigError, EggrollError, EngineDiedError, RunError

TAIL = 2000
"""Characters of a dead process's output that a message shows."""

NUDGE: signal.Signals | None = getattr(signal, "SIGUSR2", None)
"""Signal that lets a worker look whether what it scores is still wanted."""

LOOK_S = 5.0
"""While an answer is fetched, look so often whether the cluster is still there, seconds."""
OWNER_DIED = "owner has died"
"""What Ray says of actors whose driver's node it takes for dead."""


class WorkerActor:
    """A :class:`Host` as a Ray actor; one message at a time, in the order in which the driver sends them."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._host = Host(_fetch, _is_taken_back)
        if NUDGE is not None and threading.current_thread() is threading.main_thread():
            # What is being scored may block (a request, a program that is run), and only a signal gets through.
            signal.signal(NUDGE, lambda number, frame: check_taken_back())

    def build(self, factory: bytes) -> None:
        """Make the worker. What the factory needs is imported here, when the number of threads is set.

        Raises:
            ConfigError: a module that the factory needs is not on this machine.
        """
        set_threads(self._threads)
        try:
            made = require("ray.cloudpickle", extra="ray").loads(factory)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the factory needs the module {error.name!r}, which node {platform.node()} cannot import: install it "
                "on every machine of the cluster, or define what is needed in the script itself"
            ) from error
        set_threads(self._threads)
        self._host.build(made)
        set_threads(self._threads)

    def call(self, method: str, *args: Any) -> Any:
        """A method of the host."""
        return getattr(self._host, method)(*args)


def _fetch(reference: list[Any]) -> Packed:
    """A state from the object store. It comes in a list, so that Ray passes the reference on and not the state."""
    ray = require("ray", extra="ray")
    try:
        return ray.get(reference[0])
    except ray.exceptions.RayError as error:
        raise StateLostError(str(error).splitlines()[0]) from None


def _is_taken_back() -> bool:
    """Whether the driver has cancelled the call that runs in this thread; never so on a Ray that cannot tell."""
    is_canceled = getattr(require("ray", extra="ray").get_runtime_context(), "is_canceled", None)
    return is_canceled is not None and bool(is_canceled())


class RayTransport:
    """Workers as actors of the cluster that this process is connected to.

    Ray does not restart them: a new process would have the first weights, and only the pool knows what to do about it.

    Args:
        factory: makes a worker.
        place: what each takes; it computes with as many threads as it has cores.
        death: what ended the cluster, if that can be seen from here; empty while it lives.

    Raises:
        ConfigError: the factory cannot be sent to another process.
    """

    def __init__(self, factory: Factory, place: Place, death: Callable[[], str] = lambda: "") -> None:
        self._death = death
        self._ray = require("ray", extra="ray")
        self._pickle = require("ray.cloudpickle", extra="ray")
        self.sent_bytes = self.received_bytes = 0
        self._place = place
        try:
            pickled = self._pickle.dumps(factory)
        except Exception as error:
            raise ConfigError(
                f"the factory {factory!r} cannot be sent to another process ({error}). Open files, locks and loaded "
                "models cannot travel: make them inside the factory"
            ) from error
        self._factory = self._ray.put(pickled)  # once, however many workers there are
        self._actor = self._ray.remote(WorkerActor)
        self._states: set[Any] = set()
        self._placed: list[tuple[Any, Any]] = []  # each actor and its placement group

    def launch(self) -> Any:
        """A new actor, wherever there is room."""
        group = self._place.reserve()
        try:
            options = self._place.options(group)
            actor = self._actor.options(max_restarts=0, max_task_retries=0, **options).remote(self._place.cpus)
        except BaseException:
            release(group)
            raise
        self._placed.append((actor, group))
        return actor

    def build(self, worker: Any) -> Any:
        """Let it make its worker."""
        return worker.build.remote(self._factory)

    def send(self, worker: Any, method: str, *args: Any) -> Any:
        """Send a message."""
        if method == "catch_up" and args[0] is not None:
            args = ([args[0]], *args[1:])
        self.sent_bytes += len(self._pickle.dumps((method, args)))
        ticket = worker.call.remote(method, *args)
        if method == "state":
            self._states.add(ticket.hex())
        return ticket

    def wait(self, tickets: Sequence[Any], timeout: float) -> list[Any]:
        """The first answer, and whatever else is there by then.

        Raises:
            RunError: the cluster is gone.
        """
        if not tickets:
            return []
        first, rest = self._ray.wait(list(tickets), num_returns=1, timeout=timeout, fetch_local=False)
        self._check_alive()
        if first and rest:
            first += self._ray.wait(rest, num_returns=len(rest), timeout=0, fetch_local=False)[0]
        return first

    def result(self, ticket: Any) -> Any:
        """The answer."""
        errors = self._ray.exceptions
        try:
            value = self._get(ticket)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if not isinstance(cause, Exception):
                raise
            if isinstance(cause, EngineDiedError):  # what is left of the worker is of no use
                raise WorkerLostError(str(cause).split(". ")[0]) from None
            if not isinstance(cause, EggrollError):  # a bug in someone's code: where it is
                cause.add_note("In a worker of the cluster:\n" + re.sub("\x1b\\[\\d+m", "", str(error)))
            raise cause from None
        except errors.TaskCancelledError as error:
            raise TakenBackError(str(error)) from None
        except errors.RayError as error:
            if OWNER_DIED in str(error):  # no new worker would live, either
                raise RunError(
                    f"Ray has declared the machine of this process dead ({_reason(error)}), and ends all its workers. "
                    "It may have been too busy to answer: start the cluster with more patience, for example with "
                    "RAY_health_check_timeout_ms=60000 in the environment of `ray start --head`"
                ) from None
            raise WorkerLostError(_reason(error)) from None
        if ticket.hex() in self._states:
            self._states.discard(ticket.hex())
        else:
            self.received_bytes += len(self._pickle.dumps(value))
        return value

    def take_back(self, ticket: Any) -> None:
        """Cancel a call: one that waits is not made, one that runs is told (see :func:`_is_taken_back`)."""
        with suppress(Exception):  # an answer that is there, a worker that is gone, a Ray that cannot
            self._ray.cancel(ticket)

    def nudge(self, info: dict[str, Any]) -> None:
        """Signal a worker on this machine; of others, the one that has to answer is replaced after a while."""
        if NUDGE is not None and info.get("node") == platform.node() and _is_worker(info["pid"]):
            with suppress(OSError):
                os.kill(info["pid"], NUDGE)

    def _get(self, ticket: Any) -> Any:
        """An answer, which may have to come from another node. Of a cluster that dies meanwhile, it never comes."""
        while True:
            try:
                return self._ray.get(ticket, timeout=LOOK_S)
            except self._ray.exceptions.GetTimeoutError:
                self._check_alive()

    def _check_alive(self) -> None:
        if gone := self._death():
            raise RunError(
                f"the Ray cluster of this run is gone: {gone}, and the workers with it. If nobody ended it, the "
                "machine may be out of memory (the kernel's log says so): use fewer workers, or ones that need less"
            )

    def keep(self, state: Packed) -> Any:
        """Put a state into the object store; it lies with the driver."""
        return self._ray.put(state)

    def stop(self, worker: Any) -> None:
        """Kill an actor, and give its placement group back."""
        groups = [group for actor, group in self._placed if actor is worker]
        self._placed = [(actor, group) for actor, group in self._placed if actor is not worker]
        if self._ray.is_initialized() and not self._death():
            self._ray.kill(worker)
            for group in groups:
                release(group)

    def last_output(self, info: dict[str, Any]) -> str:
        """The end of the file that its standard error went to, where that is on this machine."""
        try:
            text = Path(info["output"]).read_text(errors="replace")
        except (KeyError, OSError):
            return ""
        return "\n".join(line for line in text[-TAIL:].splitlines() if not line.startswith(":"))

    def shortage(self) -> str:
        """What a worker needs and what the cluster has."""
        return self._place.shortage()

    def close(self) -> None:
        """Kill all actors."""
        for actor, _ in list(self._placed):
            self.stop(actor)


def _is_worker(pid: int) -> bool:
    """Whether a process of this machine is an actor of ours; other machines may have the same name."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::WorkerActor")
    except OSError:
        return False


def _reason(error: Exception) -> str:
    """What Ray says about a death, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = ("dead because", "exit detail", "killed", "ModuleNotFoundError", "failed to import")
    telling = [line for line in lines if any(word in line for word in words)]
    return (telling or lines or [type(error).__name__])[0].split(" Some common causes")[0][:300]
