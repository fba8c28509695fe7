"""The update that EggRoll and OpenES share: distinct draws, sums over them in bounded memory, the solver's step.

Members that have the same draw (the two of an antithetic pair; generations that repeat a noise index) are merged before
anything is drawn: their scores, with their signs, add up to the draw's weight. Then, chunk by chunk,

    grad = (1/N) sum_d w_d (sigma / sqrt(r)) A_d B_d^T          one product (a, chunk r) @ (chunk r, b) per chunk
    grad = (1/N) sum_d w_d sigma Z_d                            dense draws

which is the same as the sum over members, with half the draws. The number of chunks is known only when it runs (a
loop with a computed end), their size when it is compiled.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]

from eggroll.errors import ConfigError
from eggroll.jax.gradient import add_parts, chunk_bytes, weighted_sum
from eggroll.jax.models._leaves import CLASS_NAMES
from eggroll.jax.noiser import _draws

LOW_RANK = "low_rank"
DENSE = "dense"


class Draws(NamedTuple):
    """The distinct draws of a population, in the first ``number`` of N places; the others have the weight 0."""

    epochs: Any
    pairs: Any
    weights: Any
    number: Any


class _Leaf(NamedTuple):
    """A parameter that is updated. ``shape`` is that of a slice, ``keys`` has one key for each."""

    place: int
    kind: str
    shape: tuple[int, ...]
    dtype: Any
    keys: Any


def es_update(
    frozen_noiser_params: dict[str, Any],
    noiser_params: dict[str, Any],
    params: Any,
    base_keys: Any,
    fitnesses: Any,
    iterinfos: Any,
    es_map: Any,
    *,
    kinds: dict[int, str],
) -> tuple[dict[str, Any], Any]:
    """A step. ``kinds``: how each class of parameter is perturbed; classes that are not in it stay as they are."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in paths]
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    problems: list[str] = []
    fitnesses, epochs, threads = _population(fitnesses, iterinfos, problems)
    classes = _aligned(treedef, es_map, "es_map", problems)
    keys = _aligned(treedef, base_keys, "base_keys", problems)
    updated: list[_Leaf] = []
    for index, values in enumerate(zip(names, leaves, classes, keys, strict=True) if not problems else ()):
        leaf = _leaf(index, *values, kinds, problems)
        updated += [leaf] if leaf is not None else []
    if problems:
        raise ConfigError.from_problems("do_updates", problems)

    draws = distinct_draws(fitnesses, epochs, threads, frozen_noiser_params["noise_reuse"])
    sums = _gradients(frozen_noiser_params, noiser_params["sigma"], updated, draws)
    grads = [jnp.zeros_like(leaf) for leaf in leaves]
    for leaf in updated:
        param = leaves[leaf.place]
        # The same dtype as the parameter: the solver's state then keeps its dtypes from step to step.
        scale = -1.0 / math.sqrt(fitnesses.shape[0])
        grads[leaf.place] = (sums[leaf.place] * scale).reshape(param.shape).astype(param.dtype)
    updates, opt_state = frozen_noiser_params["solver"].update(
        treedef.unflatten(grads), noiser_params["opt_state"], params
    )
    stepped = treedef.flatten_up_to(optax.apply_updates(params, updates))
    moved = {leaf.place for leaf in updated}
    # Weight decay moves a parameter without a gradient too. One that is not evolved stays what it is.
    new = [stepped[index] if index in moved else leaf for index, leaf in enumerate(leaves)]
    return {**noiser_params, "opt_state": opt_state}, treedef.unflatten(new)


def distinct_draws(fitnesses: Any, epochs: Any, threads: Any, noise_reuse: int) -> Draws:
    """The draws of a population and their weights: the sum of the scores of a draw's members, with their signs.

    Args:
        fitnesses: ``(N,)`` float.
        epochs: ``(N,)`` integers.
        threads: ``(N,)`` integers.
        noise_reuse: as in ``init_noiser``.
    """
    epochs, pairs = _draws.true_epoch(epochs, noise_reuse), threads // 2
    order = jnp.lexsort((pairs, epochs))
    epochs, pairs = epochs[order], pairs[order]
    new = (epochs[1:] != epochs[:-1]) | (pairs[1:] != pairs[:-1])
    place = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    signed = (fitnesses * _draws.sign_of(threads).astype(fitnesses.dtype))[order]
    return Draws(
        jnp.zeros_like(epochs).at[place].set(epochs),
        jnp.zeros_like(pairs).at[place].set(pairs),
        jnp.zeros_like(signed).at[place].add(signed, indices_are_sorted=True),
        place[-1] + 1,
    )


def _gradients(frozen: dict[str, Any], sigma: Any, leaves: list[_Leaf], draws: Draws) -> dict[int, Any]:
    """For each leaf, by its index, the sum over draws: ``(number of slices, *shape of a slice)``."""
    groups: dict[Any, list[_Leaf]] = {}
    for leaf in leaves:
        # Without batching every parameter is a group of its own; a stack of layers that is scanned is one parameter.
        group = (leaf.kind, leaf.shape, leaf.dtype) if frozen["use_batched_update"] else leaf.place
        groups.setdefault(group, []).append(leaf)
    result = {}
    for members in groups.values():
        rank = frozen["rank"] if members[0].kind == LOW_RANK else 0
        keys = jnp.concatenate([leaf.keys for leaf in members]) if len(members) > 1 else members[0].keys
        sums = weighted_sums(
            keys, draws, sigma, members[0].shape, members[0].dtype, rank, chunk_bytes(math.prod(members[0].shape))
        )
        ends = np.cumsum([leaf.keys.shape[0] for leaf in members])
        for leaf, end in zip(members, ends, strict=True):
            result[leaf.place] = sums[end - leaf.keys.shape[0] : end]
    return result


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def weighted_sums(
    keys: Any, draws: Draws, sigma: Any, shape: tuple[int, ...], dtype: Any, rank: int, max_bytes: int
) -> Any:
    """``sum_d w_d perturbation_d`` for each key.

    Args:
        keys: ``(K, ...)``, base keys.
        draws: the population's.
        sigma: standard deviation of an entry.
        shape: of the parameter.
        dtype: of the parameter, in which noise is drawn and scaled, as in the evaluation.
        rank: 0 for dense draws.
        max_bytes: bound on the size of the draws that are made at one time.

    Returns:
        ``(K, *shape)`` in float32 (float64 for float64).
    """
    wide = _draws.accumulator(dtype)
    size = (shape[0] + shape[1]) * rank if rank else math.prod(shape)
    draw_bytes = max(size, 1) * jnp.dtype(wide).itemsize
    places = draws.weights.shape[0]
    # Half of the places is what an antithetic population fills.
    chunk = max(1, min(max_bytes // draw_bytes, -(-places // 2)))
    epochs, pairs, weights = (jnp.pad(array, (0, -places % chunk)) for array in draws[:3])
    scale = sigma / math.sqrt(rank) if rank else sigma

    def one_part(key: Any, index: Any) -> Any:
        epoch, pair, weight = (
            jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk) for array in (epochs, pairs, weights.astype(wide))
        )
        draw_keys = jax.vmap(_draws.draw_key, in_axes=(None, 0, 0))(key, epoch, pair)
        if not rank:
            noise = jax.vmap(lambda draw_key: _draws.dense_draw(draw_key, shape, dtype))(draw_keys)
            return weighted_sum(_draws.scaled(noise, scale).astype(wide), weight, precision="highest")
        a, b = jax.vmap(lambda draw_key: _draws.factor_draw(draw_key, shape, dtype, rank))(draw_keys)
        return weighted_sum((_draws.scaled(a, scale).astype(wide), b.astype(wide)), weight, precision="highest")

    def one_key(key: Any) -> Any:
        return add_parts(-(-draws.number // chunk), partial(one_part, key), jnp.zeros(shape, wide))

    if keys.shape[0] == 1:
        return one_key(keys[0])[None]
    # Several parameters at a time, as many as the bound allows.
    together = max(1, min(max_bytes // (draw_bytes * chunk), keys.shape[0]))
    return jax.lax.map(one_key, keys, batch_size=together)


def _population(fitnesses: Any, iterinfos: Any, problems: list[str]) -> tuple[Any, Any, Any]:
    """Fitnesses, epochs and thread ids as arrays of one length."""
    fitnesses = jnp.asarray(fitnesses)
    fitnesses = fitnesses.astype(jnp.promote_types(fitnesses.dtype, jnp.float32))
    if fitnesses.ndim != 1:
        problems.append(f"fitnesses has the shape {fitnesses.shape}; give one number per member, shape (N,)")
        return fitnesses, None, None
    size = fitnesses.shape[0]
    if size % 2 or not size:
        problems.append(
            f"the number of fitnesses (={size}) must be even and not 0, because the threads 2k and 2k + 1 are an "
            f"antithetic pair; use {size + 1 if size % 2 else 2}"
        )
    if not isinstance(iterinfos, (tuple, list)) or len(iterinfos) != 2:
        problems.append("iterinfos must be (epochs, thread_ids)")
        return fitnesses, None, None
    epochs, threads = (jnp.asarray(part) for part in iterinfos)
    # One epoch for all is what nearly everyone has.
    epochs = jnp.broadcast_to(epochs, (size,)) if epochs.ndim == 0 else epochs
    for name, part in (("epochs", epochs), ("thread_ids", threads)):
        if part.shape != (size,):
            problems.append(f"{name} has the shape {part.shape}, but there are {size} fitnesses; it must be ({size},)")
        elif not jnp.issubdtype(part.dtype, jnp.integer):
            problems.append(f"{name} has the dtype {part.dtype}; it must be an integer one")
    return fitnesses, epochs, threads


def _aligned(treedef: Any, tree: Any, name: str, problems: list[str]) -> list[Any]:
    """The parts of ``tree`` at the places of the parameters."""
    try:
        return treedef.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        problems.append(f"{name} must have the structure of params, but it differs: {error}")
        return []


def _leaf(
    index: int, name: str, param: Any, es_class: Any, key: Any, kinds: dict[int, str], problems: list[str]
) -> _Leaf | None:
    """What is to be computed for a parameter; nothing for one that stays as it is, or that has a problem."""
    if isinstance(es_class, jax.core.Tracer):
        problems.append(f"es_map{name} is traced; it must be static: close over es_map, do not pass it to jit")
        return None
    if not isinstance(es_class, (int, np.integer)) or int(es_class) not in CLASS_NAMES:
        allowed = ", ".join(f"{number} ({word})" for number, word in CLASS_NAMES.items())
        problems.append(f"es_map{name} (={es_class!r}) must be one of {allowed}")
        return None
    kind = kinds.get(int(es_class))
    if kind is None:
        return None
    if not jnp.issubdtype(param.dtype, jnp.floating):
        problems.append(
            f"params{name} has the dtype {param.dtype}, which noise cannot be added to; mark it EXCLUDED (3)"
        )
        return None
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    lead = key.shape if typed else key.shape[:-1]
    shape = tuple(param.shape)
    if shape[: len(lead)] != lead:
        problems.append(
            f"base_keys{name} holds keys of the shape {lead}, but params{name} has the shape {shape}: there must be "
            "one key for each slice along the scanned axes, which come first"
        )
        return None
    part = shape[len(lead) :]
    if kind == LOW_RANK and len(part) != 2:
        problems.append(
            f"params{name} is {CLASS_NAMES[int(es_class)]} and has the shape {part} (without scanned axes); a low-rank "
            "perturbation needs 2 axes: name leading axes in scan_map, or mark it PARAM (0)"
        )
        return None
    count = math.prod(lead)
    return _Leaf(index, kind, part, param.dtype, key.reshape(count) if typed else key.reshape(count, key.shape[-1]))
