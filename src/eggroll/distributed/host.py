"""What surrounds a worker in its process: construction, messages, and where it is in the run."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import numpy as np

from eggroll.core.records import UpdateRecord
from eggroll.distributed.state import Packed, digest, pack, unpack
from eggroll.errors import EggrollError, RewardError, raised_at
from eggroll.loop import Worker

Factory = Callable[[], Worker]
"""Makes a worker; called in the worker's own process. Anything that cloudpickle can send: a closure will do."""
Change = tuple[float, float | None]
"""What an update did: the norm of the change, and its cosine with the change before, where a worker measures it."""
Message = tuple[int, float, float, bytes, dict[str, Any]]
"""A record on the wire: generation, sigma, lr, shaped fitness as float32, totals."""


class StateLostError(Exception):
    """The state that a worker should start from is gone, with the machine that held it."""


class OutOfStepError(Exception):
    """A record came to a worker that lacks an earlier one, because it could not load its state."""


class TakenBackError(Exception):
    """What is being scored is not wanted any more."""


_TAKEN_BACK: ContextVar[Callable[[], bool] | None] = ContextVar("eggroll_taken_back", default=None)


def check_taken_back() -> None:
    """For code that takes long within a worker's evaluation: leave it if the run was interrupted.

    Raises:
        TakenBackError: the driver does not wait for the scores any more.
    """
    taken_back = _TAKEN_BACK.get()
    if taken_back is not None and taken_back():
        raise TakenBackError("the run was interrupted")


def to_message(record: UpdateRecord) -> Message:
    """A record in 4 bytes a member."""
    return record.generation, record.sigma, record.lr, record.weights.tobytes(), dict(record.totals)


def from_message(message: Message) -> UpdateRecord:
    """The inverse of :func:`to_message`."""
    generation, sigma, lr, weights, totals = message
    return UpdateRecord.make(generation, sigma, lr, np.frombuffer(weights, dtype=np.float32), totals)


class Host:
    """A worker and its position: how many records it has taken since the beginning of the run.

    Args:
        resolve: turns a reference to a state into the state; raises :class:`StateLostError` if it is gone.
        taken_back: whether the driver has taken back the message that is being worked off.
    """

    def __init__(self, resolve: Callable[[Any], Packed], taken_back: Callable[[], bool] | None = None) -> None:
        self._resolve, self._taken_back = resolve, taken_back
        self._worker: Worker | None = None
        self._position = 0
        self._change: Change = (0.0, None)

    @property
    def worker(self) -> Worker:
        """The worker, once it is built."""
        assert self._worker is not None, "the worker is not built"
        return self._worker

    def hello(self) -> dict[str, Any]:
        """Who and where this is: node, pid, and the file that holds what the process writes, if it is one."""
        output = ""
        with suppress(OSError):
            output = os.readlink("/proc/self/fd/2")
        return {"node": platform.node(), "pid": os.getpid(), "output": output if os.path.isfile(output) else ""}

    def build(self, factory: Factory) -> None:
        """Make the worker.

        Raises:
            EggrollError: what the factory raised, with the node's name.
        """
        try:
            self._worker = factory()
        except EggrollError as error:
            raise type(error)(f"{error} (on node {platform.node()})") from error

    def catch_up(self, base: Any, position: int, messages: Sequence[Message]) -> tuple[int, Change]:
        """Come to where the others are: a state, then the records after it. Returns the position and the last change.

        Args:
            base: reference to the state, or ``None`` for the weights that the factory made.
            position: records that ``base`` holds.
            messages: the records from ``position`` on; those that were taken already are skipped.

        Raises:
            StateLostError: the state is gone.
        """
        if base is not None:
            self.worker.load_state_tensors(unpack(self._resolve(base)))
            self._position, self._change = position, (0.0, None)
        for offset, message in enumerate(messages):
            self.apply(position + offset, message)
        return self._position, self._change

    def apply(self, position: int, message: Message) -> Change:
        """Take the record that follows ``position`` others; one that was taken already changes nothing.

        Raises:
            OutOfStepError: an earlier record is missing.
        """
        if position > self._position:
            raise OutOfStepError(f"record {position} came to a worker that has taken {self._position}")
        if position == self._position:
            norm = self.worker.apply(from_message(message))
            self._change = norm, getattr(self.worker, "update_cosine", None)
            self._position += 1
        return self._change

    def evaluate(self, generation: int, sigma: float, start: int, stop: int) -> tuple[Any, ...]:
        """Score the members of a range: fitness, metrics, tokens, samples, totals.

        Raises:
            RewardError: the worker returned another number of scores.
        """
        token = _TAKEN_BACK.set(self._taken_back)
        try:
            found = self.worker.evaluate(generation, sigma, range(start, stop))
        except RewardError as error:
            place = raised_at(error)  # the cause, with its lines, does not go from process to process
            if place is not None:
                error.add_note(place)
            raise
        finally:
            _TAKEN_BACK.reset(token)
        fitness = np.asarray(found.fitness)
        if fitness.ndim not in (1, 2) or len(fitness) != stop - start:
            raise RewardError(
                f"a worker's evaluate() must return ({stop - start},) or ({stop - start}, prompts) scores for members "
                f"{start} to {stop - 1}; it returned {fitness.shape}"
            )
        return fitness, found.metrics, found.tokens, found.samples, found.totals

    def heldout(self, generation: int) -> tuple[Any, ...]:
        """The center's held-out score: reward, samples, metrics."""
        found = self.worker.heldout(generation)
        return found.reward, found.samples, found.metrics

    def state(self) -> Packed:
        """The replica's state."""
        return pack(self.worker.state_tensors())

    def digest(self) -> str:
        """A digest of the replica's parameters."""
        return digest(self.worker.state_tensors())


def set_threads(threads: int) -> None:
    """Compute with this many threads in this process, whatever library does it.

    Called before the worker is made, for libraries that read the environment when they are loaded, and after it for
    PyTorch, if it is there by then.
    """
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
