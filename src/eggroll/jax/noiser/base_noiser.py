"""The interface of all noisers, and the noiser that adds no noise.

State goes in, state comes out; nothing is stored in a class. ``frozen_noiser_params`` is a plain dict of static values,
to be closed over by jitted functions; ``noiser_params`` is a dict of arrays that changes from epoch to epoch.
"""

from __future__ import annotations

from typing import Any

Params = Any
"""A pytree of arrays."""


class Noiser:
    """No noise: the model as it is, for clean evaluation. Base of all noisers, which share its signatures.

    State is empty, products are plain, scores and parameters come back as they were given.
    """

    @classmethod
    def init_noiser(
        cls, params: Params, sigma: Any, lr: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Static and dynamic state for a model: ``(frozen_noiser_params, noiser_params)``, both empty here.

        Args:
            params: pytree of arrays, the center of the population.
            sigma: standard deviation of an entry of a perturbation.
            lr: learning rate of the solver, a number or an optax schedule.
            *args: for noisers with settings of their own.
            **kwargs: likewise.
        """
        return {}, {}

    @classmethod
    def do_mm(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        param: Any,
        base_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        """``x @ param.T`` with the member's noise in ``param``.

        Args:
            frozen_noiser_params: static state.
            noiser_params: dynamic state.
            param: ``(a, b)``.
            base_key: this parameter's key, a leaf of ``simple_es_tree_key``.
            iterinfo: ``(epoch, thread_id)``, or ``None`` for no noise.
            x: ``(..., b)``.

        Returns:
            ``(..., a)``.
        """
        return x @ param.T

    @classmethod
    def do_Tmm(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        param: Any,
        base_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        """``x @ param`` with noise: ``x`` is ``(..., a)``, ``param`` ``(a, b)``, the result ``(..., b)``."""
        return x @ param

    @classmethod
    def do_emb(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        param: Any,
        base_key: Any,
        iterinfo: Any,
        x: Any,
    ) -> Any:
        """``param[x]`` with noise: ``x`` is ``(...)`` integers, ``param`` ``(a, b)``, the result ``(..., b)``."""
        return param[x]

    @classmethod
    def get_noisy_standard(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        param: Any,
        base_key: Any,
        iterinfo: Any,
    ) -> Any:
        """The parameter with noise, its shape and dtype unchanged; for biases, scales and all that is no matrix."""
        return param

    @classmethod
    def convert_fitnesses(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        raw_scores: Any,
        num_episodes_list: Any = None,
    ) -> Any:
        """Fitness, one per member, from ``raw_scores`` ``(N,)``; here the scores as they are.

        Args:
            frozen_noiser_params: static state.
            noiser_params: dynamic state.
            raw_scores: ``(N,)``, higher is better.
            num_episodes_list: ``(N,)``, the number of episodes that each score is the mean of.
        """
        return raw_scores

    @classmethod
    def do_updates(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        params: Params,
        base_keys: Any,
        fitnesses: Any,
        iterinfos: Any,
        es_map: Any,
    ) -> tuple[dict[str, Any], Params]:
        """One step of evolution.

        Args:
            frozen_noiser_params: static state.
            noiser_params: dynamic state.
            params: pytree of arrays.
            base_keys: of ``simple_es_tree_key``, the structure of ``params``.
            fitnesses: ``(N,)``, converted; N is even.
            iterinfos: ``(epochs, thread_ids)``, each ``(N,)`` integers; what the fitnesses were evaluated with.
            es_map: the structure of ``params``, each leaf one of PARAM, MM_PARAM, EMB_PARAM, EXCLUDED.

        Returns:
            ``(noiser_params, params)``, here as they were given: without noise there is nothing to learn from.
        """
        return noiser_params, params
