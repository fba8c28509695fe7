"""Compiled parts of a model run as they are written while it is a population.

``torch.compile`` would trace the rules of values, operation by operation, for half a minute and to no use.
"""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager

import torch


def uncompiled() -> AbstractContextManager[object]:
    """Inside the block, compiled modules and functions are not compiled, and run as they are written."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return contextlib.nullcontext()  # nothing has been compiled, and the import takes seconds
    return torch.compiler.set_stance("force_eager")
