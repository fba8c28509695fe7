"""EGGROLL for PyTorch: noise, perturbed weights, populations and the update.

Names are loaded on first use: importing this package does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eggroll._lazy import attach

if TYPE_CHECKING:
    from eggroll.torch.active import Active as Active
    from eggroll.torch.optimizer import EGGROLL as EGGROLL
    from eggroll.torch.population import Population as Population
    from eggroll.torch.replica import Replica as Replica

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Active": "eggroll.torch.active",
        "EGGROLL": "eggroll.torch.optimizer",
        "Population": "eggroll.torch.population",
        "Replica": "eggroll.torch.replica",
    },
    extra="torch",
)
