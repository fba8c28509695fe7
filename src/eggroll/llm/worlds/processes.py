"""Worlds in processes of their own: what hangs for good, or takes its process with it, is ended with the process."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

from eggroll.distributed.host import check_taken_back
from eggroll.errors import ConfigError
from eggroll.llm.worlds.calls import MAX_THREADS
from eggroll.llm.worlds.host import Factory, Host
from eggroll.llm.worlds.world import Completion, Failure, Opening, Turn

GRACE_S = 30.0
"""Beside the worlds' own time: for a process to start, and to import what a world needs."""
LOOK_UP_S = 0.5


class ProcessHost:
    """Worlds shared out among processes, each a :class:`~eggroll.llm.worlds.host.Host` with threads.

    Args:
        factory: makes a world; it travels to the processes, as does all that worlds say.
        timeout: seconds that a call may take.
        name: of the world, for messages.
        workers: processes; row ``i`` lives in the one with the number ``i % workers``.

    Raises:
        ConfigError: the factory cannot travel.
    """

    def __init__(self, factory: Factory, timeout: float, name: str, workers: int) -> None:
        try:
            ForkingPickler.dumps(factory)
        except Exception as error:
            raise ConfigError(
                f"the world {name} cannot be sent to processes ({error}): define it at the top of a module or a file, "
                "or leave world_workers (--world-workers) at 0"
            ) from error
        self.factory, self.timeout, self.name, self.workers = factory, timeout, name, workers
        self._processes: list[_Process | None] = [None] * workers

    def open(self, rows: Mapping[int, dict[str, Any]]) -> dict[int, Opening | Failure]:
        """See :class:`~eggroll.llm.worlds.host.Hosting`."""
        return self._ask("open", rows)

    def step(self, said: Mapping[int, Completion]) -> dict[int, Turn | Failure]:
        """See :class:`~eggroll.llm.worlds.host.Hosting`."""
        return self._ask("step", said)

    def end(self, rows: Sequence[int], *, show: bool) -> dict[int, Any]:
        """See :class:`~eggroll.llm.worlds.host.Hosting`; the worlds that are shown are copies."""
        return self._ask("end", dict.fromkeys(rows), show=show)

    def close(self) -> None:
        """See :class:`~eggroll.llm.worlds.host.Hosting`."""
        for process in filter(None, self._processes):
            process.kill()
        self._processes = [None] * self.workers

    def _ask(self, method: str, rows: Mapping[int, Any], **more: Any) -> dict[int, Any]:
        parts = [{row: value for row, value in rows.items() if row % self.workers == n} for n in range(self.workers)]
        asked = {}
        for number, part in enumerate(parts):
            if part:
                asked[number] = self._process(number)
                asked[number].ask(method, part, more)
        found: dict[int, Any] = {}
        try:
            for number, process in asked.items():
                # Calls come one after the other where there are more of them than threads.
                rounds = 1 + len(parts[number]) // MAX_THREADS
                found |= self._answer(number, process, parts[number], self.timeout * rounds + GRACE_S)
        except BaseException:  # Ctrl-C: answers that are on their way would be taken for those to the next question
            self.close()
            raise
        return found

    def _answer(self, number: int, process: _Process, part: Iterable[int], seconds: float) -> dict[int, Any]:
        answer = process.answer(seconds)
        if answer is None:
            process.kill()
            self._processes[number] = None
            text = f"world {self.name}: the process that it lived in died, or did not answer within {seconds:g} s"
            return {row: Failure("lost", text) for row in part}
        return answer

    def _process(self, number: int) -> _Process:
        process = self._processes[number]
        if process is None:
            process = self._processes[number] = _Process(self.factory, self.timeout, self.name)
        return process


class _Process:
    """A process with a host, and the pipe to it."""

    def __init__(self, factory: Factory, timeout: float, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, factory, timeout, name), name="eggroll-worlds", daemon=True
        )
        self.process.start()
        other.close()

    def ask(self, *question: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead, which the missing answer tells
            self.pipe.send(question)

    def answer(self, seconds: float) -> dict[int, Any] | None:
        """What it says; ``None`` if it has died, or says nothing within its time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if wait([self.pipe, self.process.sentinel], LOOK_UP_S):
                try:
                    found = self.pipe.recv() if self.pipe.poll() else None
                except (EOFError, OSError):
                    return None
                if isinstance(found, BaseException):
                    raise found
                return found
            check_taken_back()
        return None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, factory: Factory, timeout: float, name: str) -> None:
    host = Host(factory, timeout, name)
    while True:
        try:
            method, rows, more = pipe.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            break
        answer: Any
        try:
            answer = host.end(list(rows), **more) if method == "end" else getattr(host, method)(rows)
            blob = ForkingPickler.dumps(answer)
        except Exception as error:
            blob = ForkingPickler.dumps(
                ConfigError(
                    f"what the world {name} holds cannot be sent between processes ({error}); leave world_workers "
                    "(--world-workers) at 0"
                )
            )
        with contextlib.suppress(OSError):
            pipe.send_bytes(blob)
    os._exit(0)  # threads that hang do not keep it


__all__ = ["ProcessHost"]
