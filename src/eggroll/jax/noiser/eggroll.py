"""EGGROLL: perturbations of low rank (arXiv 2511.16652, section 4), with the conventions of HyperscaleES.

    W_p = W + sign_p (sigma / sqrt(r)) A_p B_p^T          sigma / sqrt(r) is multiplied into A only

A product with the perturbed weight is the product with the weight and two thin ones, so nothing of the weight's size
is made for a member. Noise is drawn where it is used, from the parameter's key and ``(epoch, thread_id)``.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from eggroll.jax.models._leaves import EMB_PARAM, MM_PARAM, PARAM
from eggroll.jax.noiser import _draws
from eggroll.jax.noiser._gaussian import GaussianNoiser
from eggroll.jax.noiser._update import DENSE, LOW_RANK, es_update
from eggroll.jax.noiser.base_noiser import Params


def get_lora_update_params(
    frozen_noiser_params: dict[str, Any], base_sigma: Any, iterinfo: Any, param: Any, key: Any
) -> tuple[Any, Any]:
    """The factors of a matrix's perturbation, which is ``A @ B.T``.

    Args:
        frozen_noiser_params: its ``rank`` and ``noise_reuse`` are used.
        base_sigma: ``sigma / sqrt(rank)``; the square root is the caller's.
        iterinfo: ``(epoch, thread_id)``.
        param: ``(a, b)``; only its shape and dtype count.
        key: the parameter's base key.

    Returns:
        ``A`` ``(a, rank)``, scaled by ``base_sigma`` for even and by ``-base_sigma`` for odd threads, and ``B``
        ``(b, rank)``, both in the parameter's dtype.
    """
    draw_key = _draws.member_key(frozen_noiser_params, iterinfo, key)
    a, b = _draws.factor_draw(draw_key, param.shape, param.dtype, frozen_noiser_params["rank"])
    return _draws.scaled(a, base_sigma * _draws.sign_of(iterinfo[1])), b


def get_nonlora_update_params(
    frozen_noiser_params: dict[str, Any], base_sigma: Any, iterinfo: Any, param: Any, key: Any
) -> Any:
    """A dense perturbation of the parameter's shape and dtype, ``+-base_sigma * N(0, 1)``.

    Arguments as for :func:`get_lora_update_params`, except that ``base_sigma`` is sigma itself and ``param`` may have
    any shape.
    """
    noise = _draws.dense_draw(_draws.member_key(frozen_noiser_params, iterinfo, key), param.shape, param.dtype)
    return _draws.scaled(noise, base_sigma * _draws.sign_of(iterinfo[1]))


class EggRoll(GaussianNoiser):
    """Low-rank noise for matrices and embeddings, dense Gaussian noise for the rest."""

    @classmethod
    def _factors(
        cls, frozen_noiser_params: dict[str, Any], noiser_params: dict[str, Any], param: Any, key: Any, iterinfo: Any
    ) -> tuple[Any, Any]:
        base_sigma = noiser_params["sigma"] / math.sqrt(frozen_noiser_params["rank"])
        return get_lora_update_params(frozen_noiser_params, base_sigma, iterinfo, param, key)

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
        """``x @ (param + A @ B.T).T = x @ param.T + (x @ B) @ A.T``; arguments as in :meth:`Noiser.do_mm`."""
        if iterinfo is None:
            return x @ param.T
        a, b = cls._factors(frozen_noiser_params, noiser_params, param, base_key, iterinfo)
        base = x @ param.T
        return base + _thin_products(x, b, a).astype(base.dtype)

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
        """``x @ (param + A @ B.T) = x @ param + (x @ A) @ B.T``; arguments as in :meth:`Noiser.do_Tmm`."""
        if iterinfo is None:
            return x @ param
        a, b = cls._factors(frozen_noiser_params, noiser_params, param, base_key, iterinfo)
        base = x @ param
        return base + _thin_products(x, a, b).astype(base.dtype)

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
        """``(param + A @ B.T)[x] = param[x] + A[x] @ B.T``; arguments as in :meth:`Noiser.do_emb`."""
        if iterinfo is None:
            return param[x]
        a, b = cls._factors(frozen_noiser_params, noiser_params, param, base_key, iterinfo)
        base = param[x]
        return base + _outward(a[x].astype(_draws.accumulator(base.dtype)), b).astype(base.dtype)

    @classmethod
    def get_noisy_standard(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        param: Any,
        base_key: Any,
        iterinfo: Any,
    ) -> Any:
        """``param + sigma * N(0, 1)`` with the member's sign; the parameter alone under ``freeze_nonlora``."""
        if iterinfo is None or frozen_noiser_params["freeze_nonlora"]:
            return param
        return param + get_nonlora_update_params(
            frozen_noiser_params, noiser_params["sigma"], iterinfo, param, base_key
        )

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

            MM_PARAM, EMB_PARAM:  grad = einsum('nir,njr->ij', s A, B) / N     A with sigma / sqrt(r) and sign in it
            PARAM:                grad = mean(s * sigma * N(0, 1))             none under freeze_nonlora
            EXCLUDED:             none
            params <- optax.apply_updates(params, solver(-grad * sqrt(N)))

        So a step is proportional to sigma (docs/scale-conventions.md has the conversion to other codes). Parameters
        without a gradient stay as they are bit for bit, whatever the solver does (weight decay, for example). The
        gradient is summed in float32 at least and given to the solver in the parameter's dtype.

        Returns:
            ``(noiser_params, params)`` with the new ``opt_state``.

        Raises:
            ConfigError: the arguments do not fit together.
        """
        kinds = {MM_PARAM: LOW_RANK, EMB_PARAM: LOW_RANK}
        if not frozen_noiser_params["freeze_nonlora"]:
            kinds[PARAM] = DENSE
        return es_update(
            frozen_noiser_params, noiser_params, params, base_keys, fitnesses, iterinfos, es_map, kinds=kinds
        )


def _thin_products(x: Any, inward: Any, outward: Any) -> Any:
    """``(x @ inward) @ outward.T`` in float32 at least: ``x`` ``(..., n)``, factors ``(n, r)`` and ``(m, r)``."""
    # At rank 1 a fused multiplication and sum was tried instead (2,048 members x batch 64 or 1 x 256, busy machine): on
    # two cores slower at 64 in all interleaved runs and mixed at 1, on one core equal at 64 and 10 % faster at 1.
    wide = _draws.accumulator(jnp.result_type(x, inward))
    return _outward(jnp.matmul(x, inward, preferred_element_type=wide), outward)


def _outward(middle: Any, outward: Any) -> Any:
    """``middle @ outward.T``: ``(..., r)`` and ``(m, r)`` to ``(..., m)``, in the dtype of ``middle``."""
    return jnp.matmul(middle, outward.T.astype(middle.dtype))
