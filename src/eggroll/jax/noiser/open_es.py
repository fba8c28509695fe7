"""OpenES: full-rank Gaussian perturbations of every parameter, the baseline of the paper.

    W_p = W + sign_p sigma N(0, 1)          (Salimans et al. 2017, with antithetic pairs)

Each member's weights are materialized where they are used. Key, sign, fitness and update are those of EggRoll, so that
the two differ in the perturbation only.
"""

from __future__ import annotations

from typing import Any

from eggroll.jax.models._leaves import EMB_PARAM, MM_PARAM, PARAM
from eggroll.jax.noiser._gaussian import GaussianNoiser
from eggroll.jax.noiser._update import DENSE, es_update
from eggroll.jax.noiser.base_noiser import Params
from eggroll.jax.noiser.eggroll import get_nonlora_update_params


class OpenES(GaussianNoiser):
    """Dense Gaussian noise for matrices, embeddings and all else."""

    @classmethod
    def _noisy(
        cls, frozen_noiser_params: dict[str, Any], noiser_params: dict[str, Any], param: Any, key: Any, iterinfo: Any
    ) -> Any:
        if iterinfo is None:
            return param
        return param + get_nonlora_update_params(frozen_noiser_params, noiser_params["sigma"], iterinfo, param, key)

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
        """``x @ (param + noise).T``; arguments as in :meth:`Noiser.do_mm`."""
        return x @ cls._noisy(frozen_noiser_params, noiser_params, param, base_key, iterinfo).T

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
        """``x @ (param + noise)``; arguments as in :meth:`Noiser.do_Tmm`."""
        return x @ cls._noisy(frozen_noiser_params, noiser_params, param, base_key, iterinfo)

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
        """``(param + noise)[x]``; arguments as in :meth:`Noiser.do_emb`."""
        return cls._noisy(frozen_noiser_params, noiser_params, param, base_key, iterinfo)[x]

    @classmethod
    def get_noisy_standard(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        param: Any,
        base_key: Any,
        iterinfo: Any,
    ) -> Any:
        """``param + noise``; the parameter alone under ``freeze_nonlora``."""
        if frozen_noiser_params["freeze_nonlora"]:
            return param
        return cls._noisy(frozen_noiser_params, noiser_params, param, base_key, iterinfo)

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
        """One step; arguments as in :meth:`Noiser.do_updates`.

            grad = mean(s * sigma * N(0, 1))          none for EXCLUDED, and for PARAM under freeze_nonlora
            params <- optax.apply_updates(params, solver(-grad * sqrt(N)))

        Returns:
            ``(noiser_params, params)`` with the new ``opt_state``.

        Raises:
            ConfigError: the arguments do not fit together.
        """
        kinds = {MM_PARAM: DENSE, EMB_PARAM: DENSE}
        if not frozen_noiser_params["freeze_nonlora"]:
            kinds[PARAM] = DENSE
        return es_update(
            frozen_noiser_params, noiser_params, params, base_keys, fitnesses, iterinfos, es_map, kinds=kinds
        )
