"""Calls to code that may raise, or never return: each in a thread, none longer than its time."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from eggroll.distributed.host import check_taken_back
from eggroll.llm.rewards.event_loop import Raised, settle

MAX_THREADS = 16
LOOK_UP_S = 0.5
"""Between two waits it is seen whether the work was taken back."""


class Late(Exception):
    """A call did not return in its time."""


class _Stopped(BaseException):
    """Raised in a thread whose call is late; no ``except Exception`` on its way takes it."""


def run_calls(calls: Sequence[Callable[[], Any]], timeout: float) -> list[Any]:
    """Call functions side by side, each with its own time; returns what they return or, as ``Raised``, raise.

    What is late is left to itself: an exception is raised in its thread, which ends a loop of Python; a call into C
    code that never returns keeps its thread, and a daemon's does not keep the process. Awaitables among the results are
    run on the event loop of rewards, with the same time.

    Args:
        calls: functions without arguments.
        timeout: seconds that one may take.
    """
    found = _Calls(calls, timeout).run() if calls else []
    return settle_in_time(found, timeout)


def settle_in_time(values: Sequence[Any], timeout: float) -> list[Any]:
    """:func:`~eggroll.llm.rewards.event_loop.settle`, with a time for each awaitable."""
    import asyncio
    import inspect

    async def limited(awaitable: Any) -> Any:
        try:
            async with asyncio.timeout(timeout) as scope:
                return await awaitable
        except TimeoutError:
            if scope.expired():
                raise Late from None
            raise

    return settle([limited(value) if inspect.isawaitable(value) else value for value in values])


class _Calls:
    """Threads that take one call after the other, and who looks after their time."""

    def __init__(self, calls: Sequence[Callable[[], Any]], timeout: float) -> None:
        self.calls, self.timeout = calls, timeout
        self.results: dict[int, Any] = {}
        self.started: dict[int, tuple[float, threading.Thread]] = {}
        self.next = 0
        self.changed = threading.Condition()

    def run(self) -> list[Any]:
        for _ in range(min(MAX_THREADS, len(self.calls))):
            self._thread()
        try:
            with self.changed:
                while len(self.results) < len(self.calls):
                    due = min((began for began, _ in self.started.values()), default=time.monotonic()) + self.timeout
                    self.changed.wait(max(0.0, min(due - time.monotonic(), LOOK_UP_S)))
                    self._leave_late_ones()
                    check_taken_back()
        finally:
            with self.changed:  # Ctrl-C, or all is done: nobody begins another call
                self.next = len(self.calls)
        return [self.results[index] for index in range(len(self.calls))]

    def _thread(self) -> None:
        threading.Thread(target=self._work, name="eggroll-world", daemon=True).start()

    def _work(self) -> None:
        me = threading.current_thread()
        try:
            while True:
                with self.changed:
                    index = self.next
                    if index >= len(self.calls):
                        return
                    self.next += 1
                    self.started[index] = (time.monotonic(), me)
                try:
                    result: Any = self.calls[index]()
                except BaseException as error:  # whatever a world raises, sys.exit() too
                    result = Raised(error)
                with self.changed:
                    if index not in self.started:
                        return  # given up; another thread is in this one's place
                    del self.started[index]
                    self.results[index] = result
                    self.changed.notify()
        except _Stopped:
            return

    def _leave_late_ones(self) -> None:
        now = time.monotonic()
        for index, (began, thread) in list(self.started.items()):
            if now - began >= self.timeout:
                del self.started[index]
                self.results[index] = Raised(Late())
                ident = ctypes.c_ulong(thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(_Stopped))
                self._thread()


__all__ = ["Late", "run_calls"]
