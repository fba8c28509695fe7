"""The numbers of a GGUF file's tensors, in the shapes and the order that a model of transformers has them in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eggroll._optional import require
from eggroll.torch.kernels import gguf_c

PLAIN = ("F32", "F16", "BF16")
"""Formats of GGUF that hold plain numbers."""
EXPERTS = re.compile(r"\.ffn_(gate|up|down)(_exps|\.\d+)\.weight$")
"""Names of tensors of experts: one for all of them, or, in old files, one for each."""
MERGED = re.compile(r"\.ffn_(gate|up)_exps\.weight$")
"""Tensors ``(experts, inner, width)`` that are one parameter ``(experts, 2 inner, width)``, gates first."""


def numbers_of(tensor: Any, dtype: torch.dtype, rows: np.ndarray[Any, Any] | None = None) -> Tensor:
    """A tensor of a file, expanded: the bits that ``gguf.quants.dequantize`` makes, rounded to ``dtype``.

    In C, for the formats that it knows, and otherwise as gguf does it.

    Args:
        tensor: of gguf's reader.
        dtype: of the result.
        rows: which ones of its first dimension; ``None`` for all.
    """
    kind, data = tensor.tensor_type.name, np.asarray(tensor.data)
    if kind in gguf_c.KINDS and data.ndim > 1:
        blocks = torch.from_numpy(np.array(data))  # the file itself is read-only, which PyTorch does not know
        order = None if rows is None or data.ndim > 2 else torch.from_numpy(rows)
        exact = dtype if dtype == torch.bfloat16 else torch.float32
        found = gguf_c.unpack(blocks.view(-1, blocks.shape[-1]), kind, exact, order)
        if found is not None:
            found = found.to(dtype).view(
                -1 if order is not None else blocks.shape[0], *blocks.shape[1:-1], found.shape[1]
            )
            return found if rows is None or order is not None else found[torch.from_numpy(rows)]
    if kind == "BF16":
        held = torch.from_numpy(np.array(data)).view(torch.bfloat16)
    elif kind in PLAIN:
        held = torch.from_numpy(np.array(data))
    else:
        gguf: Any = require("gguf", extra="llm")
        held = torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type))
    held = held.to(dtype)
    return held if rows is None else held[torch.from_numpy(rows)]


def row_order(tensor: Any, processor: Any) -> np.ndarray[Any, Any] | None:
    """The file's row of each of the model's rows; ``None`` if what transformers does is more than changing their order.

    Found out by letting it process the numbers of the rows instead of the rows.
    """
    rows = tensor.data.shape[0]
    numbers = np.arange(rows, dtype=np.float64)
    if tensor.data.ndim > 1:
        numbers = np.repeat(numbers[:, None], 2, axis=1)
    done = np.asarray(processor.process(weights=numbers, name=tensor.name).weights)
    if done.shape != numbers.shape:
        return None
    order = done if done.ndim == 1 else done[:, 0]
    same = np.array_equal(np.sort(order), np.arange(rows)) and (done.ndim == 1 or np.array_equal(done[:, 1], order))
    return order.astype(np.int64) if same else None


def in_order(order: np.ndarray[Any, Any]) -> bool:
    """Whether a row order changes nothing."""
    return bool(np.array_equal(order, np.arange(len(order))))


def parameter_of(tensors: Sequence[Any], processor: Any, dtype: torch.dtype) -> Tensor:
    """What transformers makes of the tensors of one parameter: one tensor, or experts' gates and what they gate.

    Args:
        tensors: of gguf's reader.
        processor: transformers' for the architecture.
        dtype: of the result.

    Raises:
        LookupError, TypeError, AttributeError: the processor wants to know the parameters that are made so far.
    """
    if len(tensors) > 1:
        gates_first = sorted(tensors, key=lambda tensor: ".ffn_gate" not in tensor.name)
        return torch.cat([numbers_of(tensor, dtype) for tensor in gates_first], dim=1)
    (tensor,) = tensors
    order = row_order(tensor, processor)
    if order is not None:
        return numbers_of(tensor, dtype, None if in_order(order) else order)
    numbers = numbers_of(tensor, torch.float32).numpy()
    return torch.from_numpy(np.array(processor.process(weights=numbers, name=tensor.name).weights)).to(dtype)
