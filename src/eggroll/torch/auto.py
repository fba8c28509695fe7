"""``mode="auto"``: the first way to evaluate a population that works for a model and agrees with its members alone."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.evaluate import Call, difference, run_loop, run_rows, run_vmap, verify
from eggroll.torch.state import StateLostError, random_numbers_kept

logger = logging.getLogger(__name__)

HOW = {
    "rows": "all members as rows of one batch",
    "vmap": "all members by torch.vmap",
    "loop": "one member after the other",
}


def run_auto(call: Call, modes: Sequence[str] = ("rows", "vmap", "loop"), *, announce: bool = True) -> tuple[str, Any]:
    """The first of ``modes`` that runs and agrees with single members, and the outputs.

    The last one is the loop, which runs whatever the model itself runs.

    Raises:
        ConfigError: inputs without rows for every member.
        UnsupportedOperationError: the model uses perturbed parameters by references of its own.
        StateLostError: the model changed something that cannot be put back.
        Exception: what the model raises for a member alone, with which everything begins.
    """
    assert call.rows >= 0  # inputs that the members do not divide are refused here, before anything is tried
    with torch.no_grad(), random_numbers_kept(call.population.device):
        call.reference(0)
    call.watch()
    reasons: dict[str, str] = {}
    for mode in modes:
        try:
            outputs, seconds = _TRIES[mode](call)
        except Exception as error:
            if mode == "loop" or isinstance(error, StateLostError):
                raise
            reasons[mode] = _first_sentence(error)
            continue
        if announce:
            _announce(call, mode, reasons, seconds)
        return mode, outputs
    raise AssertionError("the loop is the last mode")


def _rows(call: Call) -> tuple[Any, float]:
    verify(call)
    return _timed(lambda: run_rows(call, checked=True))


def _vmap(call: Call) -> tuple[Any, float]:
    outputs, seconds = _timed(lambda: run_vmap(call))
    worst, close = difference(call, outputs)
    if not close:
        raise UnsupportedOperationError(f"members differ from the same members alone by {worst:.1e} (relative)")
    return outputs, seconds


def _loop(call: Call) -> tuple[Any, float]:
    outputs, seconds = _timed(lambda: run_loop(call))
    if not call.population.plain_loop and not difference(call, outputs)[1]:
        call.population.plain_loop = True  # the model looks at what its weights are
        return _timed(lambda: run_loop(call))
    return outputs, seconds


_TRIES: dict[str, Callable[[Call], tuple[Any, float]]] = {"rows": _rows, "vmap": _vmap, "loop": _loop}


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    outputs = run()
    return outputs, time.perf_counter() - start


def _announce(call: Call, mode: str, reasons: dict[str, str], seconds: float) -> None:
    """Which mode was taken, why, and what it costs: one line."""
    count = len(call.members)
    one = seconds / count if mode == "loop" else _timed(lambda: call.reference(0))[1]
    cost = f"{_time(seconds)} for {count} member{'s' * (count > 1)}, where one alone takes {_time(one)}"
    if mode != "loop":
        cost += f" ({count * one / max(seconds, 1e-9):.1f} times as fast as one after the other)"
    why = "".join(f'; not "{other}": {reason}' for other, reason in reasons.items())
    level = logging.INFO if mode == "rows" else logging.WARNING
    logger.log(level, 'evaluating in mode="%s" (%s): %s%s', mode, HOW[mode], cost, why)


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"


def _first_sentence(error: Exception) -> str:
    """What stands before the ways out, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(" Ways out:")[0].split(". ")[0].rstrip(".")[:200]
