"""EGGROLL for PyTorch: noise, perturbed weights, populations and the update."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eggroll.torch.optimizer import EGGROLL
    from eggroll.torch.population import Population
    from eggroll.torch.replica import Replica

# The library is loaded with the first of these names, so that reading eggroll.torch costs nothing.
_LOCATIONS = {
    "EGGROLL": "eggroll.torch.optimizer",
    "Population": "eggroll.torch.population",
    "Replica": "eggroll.torch.replica",
}

__all__ = ["EGGROLL", "Population", "Replica"]


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LOCATIONS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
