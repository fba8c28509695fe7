"""``eggroll info``: what a model is made of and what a population of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class InfoOptions:
    """What ``eggroll info`` can be told."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, local directory, .gguf file, or smollm2-135m."""


def info(options: InfoOptions) -> int:
    """Show a model's parameters and what a population of it needs."""
    raise NotImplementedError
