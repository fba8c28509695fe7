"""Anchored weight decay (L2-SP) for optax: a pull back to the weights that a run began with."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax import Array
from jaxtyping import PyTree


def towards_start(strength: float) -> optax.GradientTransformation:
    """``updates + strength (params - start)``, with the parameters that ``init`` is given as the start.

    Before a rule that descends, a positive ``strength`` pulls towards the start as the gradient of ``strength/2 |params
    - start|^2`` does; after it, a negative one does. The formulas and sources are in :mod:`eggroll.torch.anchor`. The
    start is a part of the optimizer's state, and so of what a checkpoint holds.
    """

    def update(updates: PyTree[Array], start: PyTree[Array], params: Any = None) -> Any:
        assert params is not None, "the pull depends on the parameters"
        pulled = jax.tree.map(
            lambda step, now, then: step + (strength * (now - then)).astype(step.dtype), updates, params, start
        )
        return pulled, start

    return optax.GradientTransformation(lambda params: params, update)
