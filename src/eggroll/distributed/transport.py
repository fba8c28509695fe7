"""How a pool reaches its workers: processes of a cluster, or objects in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from eggroll.distributed.state import Packed


class WorkerLostError(Exception):
    """The process behind a worker is gone, or cannot be reached. The message says what is known of the reason."""


class Transport(Protocol):
    """Starts workers and carries messages. Messages to one worker are worked off in the order in which they are sent.

    Attributes:
        sent_bytes: size of all messages so far, states not counted.
        received_bytes: size of all answers so far, states not counted.
    """

    sent_bytes: int
    received_bytes: int

    def launch(self) -> Any:
        """Ask for a worker's process; returns its handle at once, however long it takes to find a place for it."""
        ...

    def build(self, worker: Any) -> Any:
        """Let the process make its worker; returns a ticket."""
        ...

    def send(self, worker: Any, method: str, *args: Any) -> Any:
        """Send a message (a method of :class:`~eggroll.distributed.host.Host`); returns a ticket for its answer."""
        ...

    def wait(self, tickets: Sequence[Any], timeout: float) -> list[Any]:
        """The tickets whose answer is there, after at most ``timeout`` seconds (perhaps none)."""
        ...

    def result(self, ticket: Any) -> Any:
        """The answer of a ticket that is ready.

        Raises:
            WorkerLostError: the worker died before it had one.
            Exception: what the worker's own code raised, as it was.
        """
        ...

    def take_back(self, ticket: Any) -> None:
        """The answer to a message is not wanted any more: if possible, the worker does not work it off."""
        ...

    def nudge(self, info: dict[str, Any]) -> None:
        """Let a process, given its ``hello``, look at once whether what it works on is still wanted."""
        ...

    def keep(self, state: Packed) -> Any:
        """Put a state where all workers can get it; returns its reference. So is the ticket of a ``state`` message."""
        ...

    def stop(self, worker: Any) -> None:
        """End a worker's process now, if it is there."""
        ...

    def last_output(self, info: dict[str, Any]) -> str:
        """The last lines that a process wrote, given its ``hello``; empty if they cannot be read from here."""
        ...

    def shortage(self) -> str:
        """What a worker needs and what there is, in words, for the message that none could be placed."""
        ...

    def close(self) -> None:
        """End everything that this transport started."""
        ...
