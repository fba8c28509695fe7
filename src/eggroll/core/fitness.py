"""From raw fitness to the weights of the estimate (EGGROLL section 4; Salimans et al. 2017 for centered ranks).

A shaping is a function of ``(N,)`` scores, or of ``(N, Q)``: one score per member and prompt. It gives weights of the
same shape, or ``(N,)``. Those here take NumPy arrays, PyTorch tensors and JAX arrays, also inside ``jax.jit`` and
``torch.compile``. They expect finite scores; :func:`shape_fitness` puts the pieces together.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from eggroll.core.arrays import Array, cast, each_column, is_traced, namespace, sort, widened
from eggroll.errors import ConfigError

VARIANCE_EPSILON = 1e-5

ShapingFunction = Callable[[Array], Array]
"""``(N,)`` or ``(N, Q)`` finite scores, higher is better, to weights of that shape, or to ``(N,)``."""
ShapingName = Literal["centered_rank", "normalized", "raw"]
if TYPE_CHECKING:
    Shaping = ShapingName | ShapingFunction
else:
    Shaping = ShapingName  # what the command line offers
Sampling = Literal["antithetic", "one_sided"]


class NonFiniteFitnessWarning(UserWarning):
    """Some members had NaN or infinite fitness and were counted as the worst."""


def replace_non_finite(fitness: Array) -> Array:
    """Fitness with NaN and infinities replaced by the worst finite value, in float64 (in JAX at least float32).

    If nothing is finite, all become 0, so that the generation changes nothing. A warning counts them, except where the
    values are not known yet (inside ``jax.jit`` and ``torch.compile``).
    """
    values = widened(fitness)
    xp = namespace(values)
    finite = xp.isfinite(values)
    if not is_traced(values):
        count, size = int((~finite).sum()), math.prod(values.shape)
        if not count:
            return values
        warnings.warn(
            f"{count} of {size} scores were NaN or infinite; they count as the worst of the generation",
            NonFiniteFitnessWarning,
            stacklevel=3,
        )
    worst = xp.where(finite, values, xp.inf).min()
    return xp.where(finite, values, xp.where(xp.isfinite(worst), worst, 0.0))


def raw(fitness: Array) -> Array:
    """``s_p = f_p``: as given."""
    return fitness


def centered_rank(fitness: Array, *, group_size: int = 0) -> Array:
    """Ranks within the group, scaled to [-0.5, 0.5]; ties share their mean rank.

    A group of equal scores gets zeros: there is nothing to learn from it.
    """
    values = widened(fitness)
    xp = namespace(values)
    groups = _grouped(values, group_size)
    members_first = xp.moveaxis(groups, 1, 0)
    ranks = each_column(_centered_rank, members_first.reshape(groups.shape[1], -1))
    return xp.moveaxis(ranks.reshape(members_first.shape), 0, 1).reshape(values.shape)


def _centered_rank(scores: Array) -> Array:
    xp, size = namespace(scores), scores.shape[0]
    if size == 1:
        return xp.zeros_like(scores)
    ordered = sort(scores)
    first = xp.searchsorted(ordered, scores, side="left")
    last = xp.searchsorted(ordered, scores, side="right") - 1
    return cast(first + last, scores.dtype) / 2 / (size - 1) - 0.5


def normalized(fitness: Array, *, group_size: int = 0, group_std: bool = False, counts: Array | None = None) -> Array:
    """``s_p = (f_p - mean) / sqrt(var + 1e-5)``: centered within the group, divided by the global deviation.

    Args:
        fitness: finite scores.
        group_size: consecutive members that are centered together; 0 means all.
        group_std: divide by the deviation of the group instead of the global one.
        counts: how many evaluations each score is the mean of, in the shape of ``fitness``; they weigh the means.
    """
    groups = _grouped(fitness, group_size)
    group_counts = None if counts is None else _grouped(counts, group_size)
    centered = groups - _mean(groups, group_counts)
    if group_std:
        variance = _variance(groups, group_counts)
    else:
        variance = _variance(fitness.reshape(1, -1), None if counts is None else counts.reshape(1, -1)).reshape(())
    return (centered / namespace(fitness).sqrt(variance + VARIANCE_EPSILON)).reshape(fitness.shape)


def leave_one_out(fitness: Array, *, group_size: int = 0) -> Array:
    """``s_p = f_p - mean_{q != p} f_q``: minus the mean of the others, which keeps a one-sided estimate unbiased."""
    groups = _grouped(fitness, group_size)
    members = groups.shape[1]
    return ((groups - _mean(groups)) * (members / max(members - 1, 1))).reshape(fitness.shape)


def keep_elite(weights: Array, elite_k: int) -> Array:
    """The k best members of ``(N,)`` weights, each with its margin over the best of the rest, and 0 for the rest."""
    margins = weights - sort(weights)[-1 - elite_k]
    return namespace(weights).where(margins > 0, margins, 0.0)


def shaping(
    method: Shaping = "centered_rank",
    *,
    sampling: Sampling = "antithetic",
    group_size: int = 0,
    group_std: bool = False,
) -> ShapingFunction:
    """The shaping that a name stands for, as a function of finite scores; arguments as in :func:`shape_fitness`.

    Raises:
        ConfigError: there is no shaping of this name, or ``module:function`` cannot be imported.
    """
    if callable(method):
        return method
    if ":" in method:
        return _imported(method)
    if method == "raw":
        return functools.partial(leave_one_out, group_size=group_size) if sampling == "one_sided" else raw
    if method == "normalized":
        return functools.partial(normalized, group_size=group_size, group_std=group_std)
    if method == "centered_rank":
        return functools.partial(centered_rank, group_size=group_size)
    raise ConfigError(f"there is no fitness shaping {method!r}; use centered_rank, normalized, raw, or a function")


def shape_fitness(
    fitness: Array,
    *,
    method: Shaping = "centered_rank",
    sampling: Sampling = "antithetic",
    group_size: int = 0,
    elite_k: int = 0,
    group_std: bool = False,
) -> Array:
    """The weights ``s_p`` of the estimate ``(1/N) sum_p s_p E_p``.

    Args:
        fitness: ``(N,)`` raw scores, higher is better, or ``(N, Q)``: one score per member and prompt. With prompts,
            each is centered (or ranked) by itself and the member's weight is the mean over its prompts.
        method: ``centered_rank``, ``normalized``, ``raw`` (with one-sided sampling that is :func:`leave_one_out`), or
            a function of your own: finite ``(N,)`` or ``(N, Q)`` scores to weights.
        sampling: how the members were drawn.
        group_size: consecutive members that are centered together; 0 means all.
        elite_k: if positive, only the k best members count (:func:`keep_elite`).
        group_std: with ``normalized``, divide by the standard deviation of the group instead of the global one.

    Returns:
        ``(N,)`` float32, of the library of ``fitness``. NaN and infinite scores count as the worst of the generation,
        with a warning.

    Raises:
        ConfigError: a function of your own gave something else than one weight per member.
    """
    values = replace_non_finite(fitness)
    size = values.shape[0]
    shaped = shaping(method, sampling=sampling, group_size=group_size, group_std=group_std)(values)
    if tuple(shaped.shape) not in ((size,), tuple(values.shape)):
        raise ConfigError(
            f"the fitness shaping {method!r} gave the shape {tuple(shaped.shape)} for scores of the shape "
            f"{tuple(values.shape)}; it must give one weight per member, ({size},), or one per score"
        )
    weights = shaped.reshape(size, -1).mean(axis=1)
    if elite_k:
        weights = keep_elite(weights, elite_k)
    return cast(weights, namespace(weights).float32)


def shaping_name(method: Shaping) -> str:
    """The name that a config file has for a shaping: its own, or ``module:function`` for a function.

    Raises:
        ConfigError: the function cannot be found again by its name.
    """
    if isinstance(method, str):
        return method
    module, name = getattr(method, "__module__", None), getattr(method, "__qualname__", "")
    if not module or not name.isidentifier():
        raise ConfigError(
            f"fitness_shaping (={method!r}) cannot be written to a run's settings: it has no name to find it by again. "
            "Use a function that is defined at the top of a module"
        )
    return f"{module}:{name}"


def _imported(path: str) -> ShapingFunction:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"fitness_shaping (={path!r}) cannot be imported ({error}); it must be module:function, and the module "
            "must be installed or lie beside the script"
        ) from None
    if not callable(found):
        raise ConfigError(f"fitness_shaping (={path!r}) is no function")
    return found


def _grouped(values: Array, group_size: int) -> Array:
    """``(groups, members, ...)``."""
    return values.reshape(-1, group_size or values.shape[0], *values.shape[1:])


def _mean(groups: Array, counts: Array | None = None) -> Array:
    """Over the members of each group, kept for broadcasting; a group whose counts are all 0 gets 0."""
    if counts is None:
        return groups.mean(axis=1, keepdims=True)
    total = counts.sum(axis=1, keepdims=True)
    xp = namespace(groups)
    return (groups * counts).sum(axis=1, keepdims=True) / xp.where(total > 0, total, 1)


def _variance(groups: Array, counts: Array | None = None) -> Array:
    xp = namespace(groups)
    if counts is None:
        return xp.var(groups, axis=1, keepdims=True, **({"correction": 0} if xp.__name__ == "torch" else {}))
    return _mean(xp.square(groups - _mean(groups, counts)), counts)
