"""Models that noisers evolve: ``base_model``, the interface; ``common``, the building blocks; ``rwkv7``."""

from __future__ import annotations

from eggroll.jax.models import base_model, common, rwkv7

__all__ = ["base_model", "common", "rwkv7"]
