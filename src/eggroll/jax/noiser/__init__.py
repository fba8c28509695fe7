"""Noisers: how weights are perturbed, scores converted and parameters updated.

``base_noiser.Noiser`` adds no noise, ``eggroll.EggRoll`` low-rank and ``open_es.OpenES`` full-rank Gaussian noise.
"""

from __future__ import annotations

from eggroll.jax.noiser import base_noiser, eggroll, open_es

all_noisers: dict[str, type[base_noiser.Noiser]] = {
    "noop": base_noiser.Noiser,
    "eggroll": eggroll.EggRoll,
    "open_es": open_es.OpenES,
}

__all__ = ["all_noisers", "base_noiser", "eggroll", "open_es"]
