"""The interface of models: four trees from ``rand_init``, one ``forward``.

A model is a class without instances. Its parts are classes of the same kind, which see their own parts of the trees.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from eggroll.errors import UnsupportedOperationError


class CommonInit(NamedTuple):
    """What initializing a model gives.

    Attributes:
        frozen_params: static values (names of activations, sizes), a dict or ``None``.
        params: pytree of arrays.
        scan_map: the structure of ``params``; each leaf is the tuple of axes along which the model scans over the
            parameter, ``()`` for none. Each slice has noise of its own.
        es_map: the structure of ``params``; each leaf is PARAM, MM_PARAM, EMB_PARAM or EXCLUDED.
    """

    frozen_params: Any
    params: Any
    scan_map: Any
    es_map: Any


class CommonParams(NamedTuple):
    """All that a forward pass needs besides its input.

    Attributes:
        noiser: a class such as ``EggRoll``.
        frozen_noiser_params: its static state.
        noiser_params: its dynamic state.
        frozen_params: the model's static values.
        params: the model's arrays.
        es_tree_key: keys in the structure of ``params``, of ``simple_es_tree_key``.
        iterinfo: ``(epoch, thread_id)``, or ``None`` for no noise.
    """

    noiser: Any
    frozen_noiser_params: Any
    noiser_params: Any
    frozen_params: Any
    params: Any
    es_tree_key: Any
    iterinfo: Any


class Model:
    """Base of all models and of their parts. Subclasses implement ``rand_init`` and ``_forward``."""

    @classmethod
    def rand_init(cls, key: Any, *args: Any, **kwargs: Any) -> CommonInit:
        """Random parameters and what belongs to them; ``key`` is a ``jax.random`` key."""
        raise UnsupportedOperationError(f"{cls.__name__} does not implement rand_init(key, ...) -> CommonInit")

    @classmethod
    def forward(
        cls,
        noiser: Any,
        frozen_noiser_params: Any,
        noiser_params: Any,
        frozen_params: Any,
        params: Any,
        es_tree_key: Any,
        iterinfo: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The output of one member (``iterinfo=(epoch, thread_id)``) or of the center (``iterinfo=None``).

        The first arguments are the fields of :class:`CommonParams`; the others go to the model.
        """
        common_params = CommonParams(
            noiser, frozen_noiser_params, noiser_params, frozen_params, params, es_tree_key, iterinfo
        )
        return cls._forward(common_params, *args, **kwargs)

    @classmethod
    def _forward(cls, common_params: CommonParams, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedOperationError(f"{cls.__name__} does not implement _forward(common_params, ...)")
