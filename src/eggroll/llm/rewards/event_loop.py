"""The event loop of ``async`` rewards: one for all of them, as long as the process lives.

A semaphore, a lock or an open connection belongs to the loop that it was first used on. With one loop, those that a
reward keeps from batch to batch stay usable, and several rewards can share them.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from eggroll.distributed.host import check_taken_back

CLEAN_UP_S = 1.0
"""How long coroutines that are cancelled have for their ``finally`` blocks."""
LOOK_UP_S = 0.5
"""Ctrl-C is seen between two waits: that of a pool's driver, and where a wait cannot be interrupted (Windows)."""


@dataclass(frozen=True)
class Raised:
    """An exception in the place of a result."""

    error: BaseException


def settle(values: Sequence[Any]) -> list[Any]:
    """The values, awaitables among them replaced by what they return or, as :class:`Raised`, raise.

    They run side by side on the process's event loop, in a thread of its own: the caller's may have a running loop, as
    a notebook's has. If the wait is interrupted (Ctrl-C), they are cancelled.
    """
    pending = [index for index, value in enumerate(values) if inspect.isawaitable(value)]
    found = list(values)
    if pending:
        for index, outcome in zip(pending, _run([values[index] for index in pending]), strict=True):
            found[index] = outcome
    return found


def result(outcome: Any) -> Any:
    """What :func:`settle` found, or the exception in its place."""
    if isinstance(outcome, Raised):
        raise outcome.error
    return outcome


def finished(value: Any) -> Any:
    """A value; an awaitable is run until it returns or raises."""
    return result(settle([value])[0])


def discard(values: Sequence[Any]) -> None:
    """Drop coroutines that will not be run, without Python's warning about them."""
    for value in values:
        if inspect.iscoroutine(value):
            value.close()


def _run(awaitables: list[Awaitable[Any]]) -> list[Any]:
    batch, loop = _Batch(awaitables), _loop(os.getpid())
    try:
        future = asyncio.run_coroutine_threadsafe(batch.run(), loop)
        while not concurrent.futures.wait([future], LOOK_UP_S).done:
            check_taken_back()
    except (
        BaseException
    ):  # Ctrl-C, here or at the driver of a pool, may come at any point in here, even before there is a future
        loop.call_soon_threadsafe(batch.cancel)
        batch.over.wait(CLEAN_UP_S)
        raise
    return future.result()


class _Batch:
    """Awaitables that run side by side and can be cancelled together."""

    def __init__(self, awaitables: list[Awaitable[Any]]) -> None:
        self.over = threading.Event()
        self._awaitables = awaitables
        self._task: asyncio.Task[Any] | None = None
        self._cancelled = False

    async def run(self) -> list[Any]:
        self._task = asyncio.current_task()
        try:
            if self._cancelled:
                discard(self._awaitables)
                raise asyncio.CancelledError
            return await asyncio.gather(*map(_outcome, self._awaitables))
        finally:
            self.over.set()

    def cancel(self) -> None:
        """Cancel them; called on the loop's thread."""
        self._cancelled = True
        if self._task is not None:
            self._task.cancel()


async def _outcome(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except BaseException as error:  # SystemExit and KeyboardInterrupt would stop the loop
        return Raised(error)


@functools.cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop of this process; one that was forked has no thread of its parent's, so it gets its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=_serve, args=(loop,), name="eggroll-async-rewards", daemon=True).start()
    atexit.register(_end, loop, process)
    return loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped. A SystemExit of a task leaves it; whoever awaits the task is told of it."""
    while True:
        try:
            loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            continue
        return


def _end(loop: asyncio.AbstractEventLoop, process: int) -> None:
    """Cancel what still runs, such as the tasks of an open connection, when the process ends."""
    if process == os.getpid():
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result(CLEAN_UP_S)
        loop.call_soon_threadsafe(loop.stop)


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
