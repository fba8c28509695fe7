"""The environment variables of eggroll, read here and nowhere else; ``docs/environment.md`` says what each one does."""

from __future__ import annotations

import os
from pathlib import Path

CACHE = "EGGROLL_CACHE_DIR"
OLD_CACHE = "EGGROLL_CACHE"
DATA = "EGGROLL_DATA_DIR"
COMPILE_NOISE = "EGGROLL_COMPILE_NOISE"
NO_C = "EGGROLL_NO_C"
FUSED_LINEAR = "EGGROLL_FUSED_LINEAR"
BLOCK_MEGABYTES = "EGGROLL_BLOCK_MB"
JUDGE_KEY = "EGGROLL_JUDGE_KEY"


def cache_directory() -> Path:
    """Where files are kept that were fetched or prepared."""
    given = os.environ.get(CACHE) or os.environ.get(OLD_CACHE)
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eggroll"


def data_directory() -> Path | None:
    """A folder with data sets, if one is named."""
    given = os.environ.get(DATA)
    return Path(given).expanduser() if given else None


def value(name: str) -> str:
    """What a variable is set to; empty if it is not."""
    return os.environ.get(name, "")


def is_on(name: str) -> bool:
    """Whether a variable is set to anything but 0."""
    return value(name) not in ("", "0")


WAITING = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "1000"}
"""How threads of OpenMP (PyTorch's, and those of our C kernels, which are the same) wait: asleep after a few
microseconds. The defaults spin for milliseconds, which takes the cores from any other program. Threads that sleep at
once make a run without neighbors slower, as decoding has a short product every few microseconds
(``benchmarks/bench_waiting.py``)."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def wait_passively() -> None:
    """Let threads sleep soon while they wait. Works before PyTorch is loaded; what the user has set stays."""
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)


def chose_threads() -> bool:
    """Whether the user has said how many threads there shall be."""
    return any(value(name) for name in THREADS)
