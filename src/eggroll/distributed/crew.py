"""The workers of a pool: who is there, who leads, what they were asked, what happens when one is lost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from eggroll.distributed.history import History
from eggroll.distributed.host import Change, OutOfStepError, StateLostError
from eggroll.distributed.transport import Transport, WorkerLostError
from eggroll.errors import MemoryBudgetError, RunError

DEATHS = 3
"""A worker that dies so often in a row without finishing anything ends the run."""
POLL_S = 1.0
"""Longest wait without looking around, seconds."""
NUDGE_S = 0.5
"""After an interrupt, workers are told so often to look whether anybody waits for them, seconds."""
GIVEN_UP_S = 10.0
"""A worker that has to answer after an interrupt and still scores then is replaced, seconds."""
PATIENCE_S = 15.0
"""With no worker placed for so long, say why, seconds."""
REPLAYED = 20
"""A worker that lacks more records than this gets a copy of the lead's state instead of replaying them."""


class WorkerWarning(UserWarning):
    """A worker died, could not be made or has to wait; the run goes on."""


class DigestWarning(WorkerWarning):
    """A worker's weights were not those of the lead; they have been replaced."""


@dataclass(eq=False)
class Seat:
    """A worker's place, for the life of one process.

    Attributes:
        phase: ``waiting`` (for a place in the cluster), ``building``, ``joining`` (catching up) or ``ready``.
        deaths: how many processes before this one died without finishing anything.
        busy: tickets of the ranges that it has, of an earlier generation too.
        info: node, pid and output file, once the process is there.
        fresh: it has the weights that the factory made.
    """

    number: int
    handle: Any
    deaths: int = 0
    phase: str = "waiting"
    busy: set[Any] = field(default_factory=set)
    info: dict[str, Any] = field(default_factory=dict)
    fresh: bool = True

    @property
    def name(self) -> str:
        """For messages: ``worker 3 (pid 4711 on node-a)``."""
        return f"worker {self.number}" + (f" (pid {self.info['pid']} on {self.info['node']})" if self.info else "")


@dataclass(frozen=True)
class Sent:
    """A message without an answer: what to do with the answer, or with the error of the worker's own code."""

    seat: Seat
    then: Callable[[Any], Any]
    failed: Callable[[Exception], None]


class Crew:
    """Starts workers, replaces lost ones, and brings each to where the others are before it gets work.

    The lead is the ready worker with the lowest number; a process that replaces a lost one has a new number, so the
    lead is whoever has been there for the longest. Answers are worked off in :meth:`pump` only.

    Args:
        transport: reaches the workers.
        start_timeout_s: how long to wait while no worker has a place.
        notify: told what happens to workers; ``None`` warns.
        on_lost: told of each worker that is gone.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        start_timeout_s: float,
        notify: Callable[[str], None] | None,
        on_lost: Callable[[Seat], None],
    ) -> None:
        self.transport, self.history = transport, History()
        self.changes: dict[int, Change] = {}
        self._start_timeout_s, self._notify, self._on_lost = start_timeout_s, notify, on_lost
        self._seats: dict[int, Seat] = {}
        self._sent: dict[Any, Sent] = {}
        self._numbers = 0
        self._refused: MemoryBudgetError | None = None
        self._taken: set[Any] = set()  # tickets whose answers nobody wants
        self._nudged = 0.0

    # -- who is there

    def seats(self) -> list[Seat]:
        """All workers, by number."""
        return list(self._seats.values())  # numbers only grow, and a dict keeps the order

    def ready(self) -> list[Seat]:
        """Workers that can be given something to do, by number; the first one leads."""
        return [seat for seat in self.seats() if seat.phase == "ready"]

    def joined(self) -> list[Seat]:
        """Workers that have to be told of updates: those that are ready, and those that catch up."""
        return [seat for seat in self.seats() if seat.phase in ("joining", "ready")]

    def has(self, seat: Seat) -> bool:
        """Whether a worker is still there."""
        return self._seats.get(seat.number) is seat

    def add(self, deaths: int = 0) -> None:
        """Ask for one more worker."""
        seat = Seat(self._numbers, self.transport.launch(), deaths)
        self._numbers += 1
        self._seats[seat.number] = seat

        def placed(info: dict[str, Any]) -> None:
            seat.info = info
            seat.phase = "building"
            ticket = self.transport.build(seat.handle)
            self._sent[ticket] = Sent(seat, lambda _: self.rejoin(seat), lambda error: self._refuse(seat, error))

        self.send(seat, "hello", then=placed)

    def wait_for_lead(self) -> None:
        """Wait until a worker is ready.

        Raises:
            EggrollError: what the factory raised.
            RunError: no worker could be placed in time, or workers die again and again.
        """
        began, told = time.monotonic(), False
        while not self.ready():
            if not self._seats:
                raise self._refused or RunError("the pool has no workers; add_worker() adds one")
            waited = time.monotonic() - began
            if all(seat.phase == "waiting" for seat in self._seats.values()):
                text = f"no worker could be placed for {waited:.0f} s: {self.transport.shortage()}"
                if waited > self._start_timeout_s:
                    raise RunError(text)
                if waited > PATIENCE_S and not told:
                    told = True
                    self.say(f"{text}. Waiting")
            self.pump(POLL_S)

    def clear(self) -> None:
        """Forget all workers."""
        self._seats, self._sent = {}, {}

    def say(self, text: str, category: type[WorkerWarning] = WorkerWarning) -> None:
        """Tell whoever wants to know what happens to workers."""
        if self._notify is not None:
            self._notify(text)
        else:
            warnings.warn(text, category, stacklevel=2)

    # -- messages

    def send(
        self,
        seat: Seat,
        method: str,
        *args: Any,
        then: Callable[[Any], Any] = lambda value: None,
        failed: Callable[[Exception], None] | None = None,
    ) -> Any:
        """Send a message; ``then`` is called with its answer. Without ``failed``, an error of the worker is raised."""
        ticket = self.transport.send(seat.handle, method, *args)
        self._sent[ticket] = Sent(seat, then, failed or _raise)
        return ticket

    def pump(self, timeout: float) -> None:
        """Wait for answers, at most ``timeout`` seconds, and work off those that are there.

        An interrupt may come at any point in here: an answer is then worked off once more, which changes nothing.
        """
        self._nudge()
        for ticket in self.transport.wait(list(self._sent), timeout):
            sent = self._sent.get(ticket)
            if sent is None:  # its worker was lost with another answer
                continue
            try:
                value = self.transport.result(ticket)
            except WorkerLostError as error:
                self._lost(sent.seat, str(error))
                continue
            except Exception as error:
                self._answered(ticket, sent.seat)
                sent.failed(error)
                continue
            sent.then(value)
            self._answered(ticket, sent.seat)

    def take_back(self) -> None:
        """Nobody waits for scores any more: let workers leave what they are at, so that they can answer a question."""
        for seat in self.seats():
            for ticket in seat.busy & self._sent.keys():
                self._sent[ticket] = Sent(seat, then=lambda _: None, failed=lambda _: None)
                self.transport.take_back(ticket)
                self._taken.add(ticket)

    def _nudge(self) -> None:
        """Workers that still score what nobody waits for: a call that blocks does not look by itself."""
        self._taken &= self._sent.keys()
        if self._taken and time.monotonic() - self._nudged > NUDGE_S:
            self._nudged = time.monotonic()
            for seat in self.seats():
                if seat.busy & self._taken:
                    self.transport.nudge(seat.info)

    def ask_lead(self, method: str, *args: Any) -> tuple[Any, Any]:
        """Ask the lead, or whoever leads when it is lost or busy; returns the answer and its ticket."""
        while True:
            self.wait_for_lead()
            ready = self.ready()
            lead = next((seat for seat in ready if not seat.busy), ready[0])
            answers: list[Any] = []
            ticket = self.send(lead, method, *args, then=answers.append)
            end = time.monotonic() + GIVEN_UP_S
            while self.has(lead) and not answers:
                self.pump(POLL_S)
                if lead.busy & self._taken and time.monotonic() > end:
                    reason = f"it did not leave what it scored within {GIVEN_UP_S:.0f} s of the interrupt"
                    self._lost(lead, reason, died=False)
            if answers:
                return answers[0], ticket

    # -- where everyone is in the run

    def rejoin(self, seat: Seat) -> None:
        """Bring a worker to where the others are: the newest known state and the records since, or the lead's state."""
        leads = [other for other in self.ready() if other is not seat]
        if leads and self.history.behind > REPLAYED:
            self.copy_lead(leads[0])
        base, position, messages = self.history.start()
        if base is None and not seat.fresh:  # only a new process has the first weights again
            self._lost(seat, "its weights cannot be brought back", died=False)
            return
        seat.phase = "joining"

        def caught_up(answer: tuple[int, Change]) -> None:
            seat.phase, seat.fresh = "ready", False
            done, change = answer
            self.changes.setdefault(done - 1, change)

        self.send(
            seat,
            "catch_up",
            base,
            position,
            messages,
            then=caught_up,
            failed=lambda e: self._not_caught_up(seat, base, e),
        )

    def copy_lead(self, lead: Seat) -> None:
        """From now on, workers that join start from the state that the lead has now. It does not come to the driver."""
        self.history.snapshot(self.transport.send(lead.handle, "state"))

    def apply(self, position: int, message: Any) -> None:
        """Send an update to everyone who is there; what it changed for the first of them goes to :attr:`changes`."""
        for seat in self.joined():
            self.send(
                seat, "apply", position, message,
                then=lambda change: self.changes.setdefault(position, change), failed=_unless_out_of_step,
            )  # fmt: skip

    # -- what goes wrong

    def _answered(self, ticket: Any, seat: Seat) -> None:
        seat.busy.discard(ticket)
        self._sent.pop(ticket, None)

    def _lost(self, seat: Seat, reason: str, *, died: bool = True) -> None:
        if not self.has(seat):
            return
        output = self.transport.last_output(seat.info)
        self.transport.stop(seat.handle)
        del self._seats[seat.number]
        self._sent = {ticket: sent for ticket, sent in self._sent.items() if sent.seat is not seat}
        self._on_lost(seat)
        deaths = seat.deaths + died
        if deaths >= DEATHS:
            wrote = f"\nThe last that it wrote:\n{output}" if output else ""
            raise RunError(
                f"{seat.name} is the {deaths}rd process in a row that died without finishing anything: {reason}{wrote}"
            )
        self.say(f"{seat.name} is gone ({reason}); its members are scored by others, and a new one is started")
        self.add(deaths)

    def _refuse(self, seat: Seat, error: Exception) -> None:
        """The factory raised. Where only the memory of one machine is short, the others go on."""
        self.transport.stop(seat.handle)
        self._seats.pop(seat.number, None)
        if not isinstance(error, MemoryBudgetError):
            raise error
        self._refused = error
        if not self._seats:
            raise error
        self.say(f"worker {seat.number} is left out: {error}")

    def _not_caught_up(self, seat: Seat, base: Any, error: Exception) -> None:
        if not isinstance(error, StateLostError):
            raise error
        leads = [other for other in self.ready() if other is not seat]
        if base is self.history.base:  # else it was replaced since this worker was sent for it
            if leads:
                self.copy_lead(leads[0])
            elif base is self.history.origin:
                raise RunError(f"the state that the run began with is gone ({error}); resume it from its directory")
            else:
                self.history.drop_base()
        self.rejoin(seat)


def _raise(error: Exception) -> None:
    raise error


def _unless_out_of_step(error: Exception) -> None:
    """A worker that could not load its state is being given another one; that its updates did not fit is no news."""
    if not isinstance(error, OutOfStepError):
        raise error
