"""Models in the form that noisers evolve: ``base_model`` is the interface, ``common`` the building blocks."""

from __future__ import annotations

from eggroll.jax.models import base_model, common

__all__ = ["base_model", "common"]
