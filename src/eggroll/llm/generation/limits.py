"""A limit on the time that code which comes with a model, such as its chat template, may take."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from eggroll.errors import DataError


class _OutOfTime(BaseException):
    """Raised in the thread whose time is up; no ``except Exception`` on its way takes it."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End the block, which runs Python code, when its time is up; in any thread, and without a signal.

    A single call into C code is not interrupted before it returns.

    Args:
        seconds: how long it may take.
        what: what takes so long, with what can be done, for the message.

    Raises:
        DataError: the time is up.
    """
    thread, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    raised = over = False

    def end() -> None:
        nonlocal raised
        with lock:
            if not over:
                raised = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_OutOfTime))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    try:
        try:
            timer.start()
            yield
        finally:
            with lock:
                over = True
            timer.cancel()
            if raised:  # it may not have arrived yet
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
    except _OutOfTime:
        raise DataError(f"{what} (more than {seconds:.0f} s)") from None
