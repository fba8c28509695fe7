"""``LocalPool``: the pool with workers in this process, for tests and for a debugger."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from eggroll.distributed.host import Factory, Host, StateLostError
from eggroll.distributed.pool import Pool, check_counts
from eggroll.distributed.state import Packed
from eggroll.distributed.transport import WorkerLostError


class LocalPool(Pool):
    """As :class:`RayPool`, with workers that take turns in this process. Needs no ray and gives the same results.

        >>> with LocalPool(factory, population_size=64) as pool:
        ...     Loop(config, pool).go()

    Args:
        factory: makes a worker.
        workers: how many; more than one gains nothing but the exercise.
        population_size: members of a generation.
        range_size: members that are evaluated together; ``None`` derives it from the population.
        check_every: generations between comparisons of all workers' weights; 0 for never.
        notify: told what happens to workers; ``None`` warns.
    """

    def __init__(
        self,
        factory: Factory,
        *,
        workers: int = 1,
        population_size: int,
        range_size: int | None = None,
        check_every: int = 10,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        check_counts(workers=(workers, 1, True), check_every=(check_every, 0, True))
        super().__init__(
            LocalTransport(factory),
            workers=workers,
            population_size=population_size,
            range_size=range_size,
            check_every=check_every,
            straggler_s=10.0,
            start_timeout_s=600.0,
            notify=notify,
        )


class _Ticket:
    """A message to a worker in this process, and its answer once it has been worked off."""

    def __init__(self, process: _Process, call: Callable[[], Any]) -> None:
        self.process, self._call = process, call
        self.done = False
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Work it off."""
        try:
            self._value = self._call()
        except Exception as error:
            self._error = error
        self.done = True

    def value(self) -> Any:
        """The answer; raises what the worker raised."""
        if self._error is not None:
            raise self._error
        if not self.done:
            raise WorkerLostError("it was stopped")
        return self._value


class _Process:
    """What stands for a worker's process: a host and its queue. ``alive`` is what a test sets to false."""

    def __init__(self) -> None:
        self.host = Host(_state_of)
        self.queue: deque[_Ticket] = deque()
        self.alive = True

    def work(self, until: _Ticket | None = None) -> None:
        """Work off one message, or all up to the given one."""
        while self.queue and self.alive:
            ticket = self.queue.popleft()
            ticket.run()
            if until is None or ticket is until:
                return


def _state_of(reference: Any) -> Packed:
    if not isinstance(reference, _Ticket):
        return reference
    reference.process.work(reference)
    try:
        return reference.value()
    except WorkerLostError as error:
        raise StateLostError(str(error)) from error


class LocalTransport:
    """A transport whose workers are objects here; one message is worked off whenever answers are waited for."""

    sent_bytes = received_bytes = 0

    def __init__(self, factory: Factory) -> None:
        self._factory = factory
        self._processes: list[_Process] = []
        self._turn = 0

    def launch(self) -> _Process:
        """A new process."""
        self._processes.append(_Process())
        return self._processes[-1]

    def build(self, worker: _Process) -> _Ticket:
        """Let it make its worker."""
        return self._queue(worker, lambda: worker.host.build(self._factory))

    def send(self, worker: _Process, method: str, *args: Any) -> _Ticket:
        """Send a message."""
        call = getattr(worker.host, method)
        # A state must not change with the worker that it was taken of, as it would not between processes.
        return self._queue(worker, (lambda: copy.deepcopy(call())) if method == "state" else lambda: call(*args))

    def wait(self, tickets: Sequence[_Ticket], timeout: float) -> list[_Ticket]:
        """Let the next worker that has something to do work off one message; the tickets that are ready."""
        if not any(ticket.done for ticket in tickets):
            for offset in range(len(self._processes)):
                process = self._processes[(self._turn + offset) % len(self._processes)]
                if process.queue and process.alive:
                    self._turn += offset + 1
                    process.work()
                    break
        return [ticket for ticket in tickets if ticket.done or not ticket.process.alive]

    def result(self, ticket: _Ticket) -> Any:
        """The answer."""
        return ticket.value()

    def take_back(self, ticket: _Ticket) -> None:
        """Nothing is worked off here unless somebody waits for it."""

    def nudge(self, info: dict[str, Any]) -> None:
        """It is this process, where Ctrl-C has arrived already."""

    def keep(self, state: Packed) -> Packed:
        """A state is its own reference."""
        return copy.deepcopy(state)

    def stop(self, worker: _Process) -> None:
        """Let a worker do nothing any more."""
        worker.alive = False
        self._processes = [process for process in self._processes if process is not worker]

    def last_output(self, info: dict[str, Any]) -> str:
        """What is written here has been seen."""
        return ""

    def shortage(self) -> str:
        """There is always a place here."""
        return "workers in this process"

    def close(self) -> None:
        """Drop all workers."""
        self._processes = []

    def _queue(self, worker: _Process, call: Callable[[], Any]) -> _Ticket:
        ticket = _Ticket(worker, call)
        worker.queue.append(ticket)
        return ticket
