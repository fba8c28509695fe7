"""What a worker that joins late needs: a state, and the records since."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from eggroll.distributed.host import Message


@dataclass
class History:
    """The records of a run from its origin on, and the newest state that is known.

    Attributes:
        origin: reference to the state that the run began with, or ``None`` for the weights that the factory makes. It
            lies with the driver, so it is there as long as the run is.
        base: reference to the newest known state. It may be lost with the machine that holds it.
        base_position: records that ``base`` holds.
    """

    origin: Any = None
    first: int = 0
    base: Any = None
    base_position: int = 0
    messages: list[Message] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Records so far."""
        return self.first + len(self.messages)

    @property
    def behind(self) -> int:
        """Records that are not in the base."""
        return self.position - self.base_position

    def begin(self, state: Any) -> None:
        """The run goes on from this state; what was before is of no use any more."""
        self.first = self.position
        self.origin, self.messages = state, []
        self.base, self.base_position = state, self.first

    def snapshot(self, state: Any) -> None:
        """A state that holds all records so far."""
        self.base, self.base_position = state, self.position

    def drop_base(self) -> None:
        """The base is lost: from the origin, all records give the same weights again."""
        self.base, self.base_position = self.origin, self.first

    def start(self) -> tuple[Any, int, list[Message]]:
        """What a worker needs: base, its position, the records after it."""
        return self.base, self.base_position, self.messages[self.base_position - self.first :]
