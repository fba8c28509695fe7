"""EGGROLL for JAX: any function (``Strategy``, ``perturb``), and code written for HyperscaleES (``as hs``)."""

from __future__ import annotations

from eggroll._optional import require

for library in ("jax", "jaxtyping", "optax"):
    require(library, extra="jax")
del library

# After the check, so that its message is the one that is seen.
from eggroll.jax import models, noiser  # noqa: E402
from eggroll.jax.perturbed import Address, perturb  # noqa: E402
from eggroll.jax.strategy import State, Strategy  # noqa: E402

__all__ = ["Address", "State", "Strategy", "models", "noiser", "perturb"]
