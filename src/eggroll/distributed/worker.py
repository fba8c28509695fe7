"""What a worker is: one replica and the evaluation of its members, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from eggroll.core.records import UpdateRecord
from eggroll.loop import Evaluation, Heldout


class Worker(Protocol):
    """One replica of the centre, with everything that it needs to score members.

    Workers that are made by the same factory have the same weights, and the same records give them the same weights
    again, bit for bit: that is all that keeps a pool of them together.
    """

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score some members.

        Args:
            generation: the generation, from 0; with ``members`` the address of the noise.
            sigma: standard deviation of the perturbations.
            members: consecutive members; both of an antithetic pair are in the same range.

        Returns:
            An evaluation whose fitness is ``(len(members),)`` or ``(len(members), prompts)``. It may depend on nothing
            but the arguments and the centre: the same range may be asked for twice, of any worker.

        Raises:
            EggrollError: the score cannot be computed; it ends the run as it is, and is not tried again.
        """
        ...

    def evaluate_center(self) -> Heldout:
        """The centre's score on held-out data."""
        ...

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        ...

    def state_tensors(self) -> Mapping[str, Any]:
        """Everything that the next update depends on: names to tensors (PyTorch or NumPy)."""
        ...

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`; tensors from a checkpoint are PyTorch's.

        They may be shared, read-only memory: copy out of them.
        """
        ...


Factory = Callable[[], Worker]
"""Makes a worker; called in the worker's own process. Anything that cloudpickle can send: a closure will do."""
