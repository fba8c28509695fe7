"""The dtype that a model is loaded in: the one that is named, or the faster one on this machine."""

from __future__ import annotations

import difflib
import math
import time
from typing import Any

import torch

from eggroll.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

BF16_MARGIN = 1.2
"""How many times faster bf16 must be to be chosen: less is noise of the measurement, and fp32 is exact."""


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype from its name; ``None`` for ``auto``.

    Raises:
        ConfigError: unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.lower().removeprefix("torch.")
    if name == "auto":
        return None
    if name not in DTYPES:
        near = difflib.get_close_matches(name, DTYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"dtype (={dtype!r}) must be one of: auto, {', '.join(DTYPES)}{hint}")
    return DTYPES[name]


def choose_dtype(device: torch.device, n: int, m: int, *, rows: int = 256) -> tuple[torch.dtype, str]:
    """fp32 or bf16, whichever multiplies ``(rows, n) x (n, m)`` faster here, and a sentence that says why.

    bf16 must win clearly, since fp32 needs no master weights. fp16 is never chosen: perturbed activations overflow.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32, "dtype float32: this GPU has no bfloat16"
    n, m = min(n, 2048), min(m, 4096)  # larger matrices would only take longer to say the same
    fp32, bf16 = _matmul_seconds(device, rows, n, m)
    chosen = torch.bfloat16 if fp32 / bf16 >= BF16_MARGIN else torch.float32
    what = f"bfloat16 runs at {fp32 / bf16:.2f} times the speed of float32 here ({rows}x{n} times {n}x{m})"
    return chosen, f"dtype {str(chosen).removeprefix('torch.')}: {what}"


def _matmul_seconds(device: torch.device, rows: int, n: int, m: int, rounds: int = 15) -> tuple[float, float]:
    """The best times of a product in fp32 and bf16, taken in turns: the best is what other processes disturb least."""
    operands = [
        (torch.ones(rows, n, device=device, dtype=dtype), torch.ones(m, n, device=device, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    best = [math.inf, math.inf]
    for round_ in range(rounds + 1):
        for index, (x, weight) in enumerate(operands):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:  # the first sets up kernels
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0], best[1]


def typical_shape(config: Any) -> tuple[int, int]:
    """Width and inner width of the model's largest kind of matrix."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0) or 512)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or getattr(text, "ffn_dim", None)
    return width, int(inner) if isinstance(inner, int) else 4 * width
