"""What the noisers with noise share: their settings, and how scores become fitnesses."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

from eggroll.core.fitness import normalized, replace_non_finite
from eggroll.errors import ConfigError
from eggroll.jax.noiser.base_noiser import Noiser, Params


class GaussianNoiser(Noiser):
    """Base of :class:`EggRoll` and :class:`OpenES`: settings, a solver, normalized fitnesses."""

    @classmethod
    def init_noiser(
        cls,
        params: Params,
        sigma: Any,
        lr: Any,
        *args: Any,
        solver: Any = None,
        solver_kwargs: dict[str, Any] | None = None,
        group_size: int = 0,
        freeze_nonlora: bool = False,
        noise_reuse: int = 0,
        rank: int = 1,
        use_batched_update: bool = False,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Static and dynamic state for a model.

        Args:
            params: pytree of arrays, the center of the population.
            sigma: standard deviation of an entry of a perturbation.
            lr: learning rate of the solver, a number or an optax schedule.
            *args: ignored, for noisers with settings of their own.
            solver: ``solver(lr, **solver_kwargs)`` makes an ``optax.GradientTransformation``; default ``optax.sgd``.
            solver_kwargs: further arguments of the solver.
            group_size: members that are compared with each other in ``convert_fitnesses``; 0: all of them.
            freeze_nonlora: leave parameters of the class PARAM alone: no noise, no update.
            noise_reuse: 0: the same noise in every epoch; k: new noise after every k epochs.
            rank: rank of the perturbation of a matrix.
            use_batched_update: treat matrices of one shape together, so that the time to compile an update does not
                grow with the number of layers. The result is the same.
            **kwargs: ignored, for noisers with settings of their own.

        Returns:
            ``(frozen_noiser_params, noiser_params)``. The latter has ``sigma``, which may be changed between epochs
            (a decay, for example), and ``opt_state``.

        Raises:
            ConfigError: a setting cannot work; all problems are named at once.
        """
        problems = []
        for name, value, least in (("rank", rank, 1), ("noise_reuse", noise_reuse, 0), ("group_size", group_size, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name} (={value!r}) must be an integer >= {least}")
        if group_size is True or group_size == 1:
            problems.append("group_size (=1) compares a member with itself only; use 0 (all members) or at least 2")
        if isinstance(sigma, (int, float)) and not (math.isfinite(sigma) and sigma >= 0):
            problems.append(f"sigma (={sigma!r}) must be finite and >= 0")
        solver = optax.sgd if solver is None else solver
        if not callable(solver):
            problems.append(
                "solver must be a function such as optax.adamw, which is called as solver(lr, **solver_kwargs)"
            )
        if problems:
            raise ConfigError.from_problems(f"{cls.__name__}.init_noiser", problems)
        transformation = solver(lr, **(solver_kwargs or {}))
        frozen_noiser_params = {
            "group_size": group_size,
            "freeze_nonlora": freeze_nonlora,
            "noise_reuse": noise_reuse,
            "solver": transformation,
            "rank": rank,
            "use_batched_update": use_batched_update,
        }
        return frozen_noiser_params, {"sigma": sigma, "opt_state": transformation.init(params)}

    @classmethod
    def convert_fitnesses(
        cls,
        frozen_noiser_params: dict[str, Any],
        noiser_params: dict[str, Any],
        raw_scores: Any,
        num_episodes_list: Any = None,
    ) -> Any:
        """Normalized fitness, one per member.

            group_size = 0:  (s - mean) / sqrt(var + 1e-5)
            group_size > 0:  (s - mean of its group) / sqrt(var + 1e-5)        with the variance of all scores

        A score that is NaN or infinite counts as the worst of the others (outside of ``jit`` with a warning), so that
        one diverged rollout does not turn the parameters into NaN. If none is finite, all fitnesses are 0.

        Args:
            frozen_noiser_params: static state.
            noiser_params: dynamic state.
            raw_scores: ``(N,)``, higher is better. Groups are runs of ``group_size`` neighbors.
            num_episodes_list: ``(N,)``, the number of episodes that each score is the mean of. They weigh the means
                and the variance, so that every *episode* counts the same in them; equal numbers change nothing. A
                member without an episode (0) has no score, and gets the fitness 0.

        Returns:
            ``(N,)``, float32 (float64 for float64 scores).

        Raises:
            ConfigError: the shapes do not fit each other or the group size.
        """
        scores = jnp.asarray(raw_scores)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        group_size = frozen_noiser_params["group_size"]
        problems = []
        if scores.ndim != 1:
            problems.append(f"raw_scores has the shape {scores.shape}; give one score per member, shape (N,)")
        elif not scores.shape[0]:
            problems.append("raw_scores is empty")
        elif group_size and scores.shape[0] % group_size:
            problems.append(f"group_size (={group_size}) must divide the number of scores (={scores.shape[0]})")
        if num_episodes_list is not None and jnp.shape(num_episodes_list) != scores.shape:
            problems.append(
                f"num_episodes_list has the shape {jnp.shape(num_episodes_list)}; "
                f"it must be that of raw_scores, {scores.shape}"
            )
        if problems:
            raise ConfigError.from_problems(f"{cls.__name__}.convert_fitnesses", problems)
        if num_episodes_list is None:
            return normalized(replace_non_finite(scores), group_size=group_size)
        episodes = jnp.asarray(num_episodes_list, scores.dtype)
        scores = replace_non_finite(jnp.where(episodes > 0, scores, 0))
        return jnp.where(episodes > 0, normalized(scores, group_size=group_size, counts=episodes), 0)
