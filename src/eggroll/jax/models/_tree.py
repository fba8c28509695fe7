"""Models made of models: joining their trees, calling a part, and the tree of keys."""

from __future__ import annotations

import difflib
from typing import Any

import jax

from eggroll.errors import ConfigError
from eggroll.jax.models.base_model import CommonInit, CommonParams


def merge_inits(**inits: CommonInit) -> CommonInit:
    """One :class:`CommonInit` of several: every tree is a dict with the part's tree under the part's name."""
    return CommonInit(*({name: init[field] for name, init in inits.items()} for field in range(4)))


def merge_frozen(common_init: CommonInit, **frozen: Any) -> CommonInit:
    """The same with further static values in ``frozen_params``."""
    return common_init._replace(frozen_params={**(common_init.frozen_params or {}), **frozen})


def call_submodule(cls: Any, name: str, common_params: CommonParams, *args: Any, **kwargs: Any) -> Any:
    """The output of the part ``name``, a model of the class ``cls``, with the part's own trees."""
    if name not in common_params.params:
        known = ", ".join(sorted(common_params.params)) or "none"
        near = difflib.get_close_matches(name, list(common_params.params), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"there is no part '{name}' in this model, only: {known}{hint}")
    part = common_params._replace(
        frozen_params=(common_params.frozen_params or {}).get(name),
        params=common_params.params[name],
        es_tree_key=common_params.es_tree_key[name],
    )
    return cls._forward(part, *args, **kwargs)


def simple_es_tree_key(params: Any, base_key: Any, scan_map: Any) -> Any:
    """A key for every parameter: the ``es_tree_key`` of a forward pass and the ``base_keys`` of an update.

    ``base_key`` is split into as many keys as there are parameters, in the order in which JAX flattens ``params``; a
    parameter that is scanned over gets a key for every slice, by :func:`recursive_scan_split`.

    Args:
        params: pytree of arrays.
        base_key: one key, of ``jax.random.key`` or ``jax.random.PRNGKey``.
        scan_map: the structure of ``params``, tuples of axes at its leaves.

    Returns:
        Keys in the structure of ``params``.

    Raises:
        ConfigError: ``scan_map`` has another structure.
    """
    leaves, treedef = jax.tree.flatten(params)
    try:
        scans = treedef.flatten_up_to(scan_map)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"scan_map must have the structure of params, but it differs: {error}") from error
    keys = jax.random.split(base_key, len(leaves))
    return treedef.unflatten(
        [recursive_scan_split(*both) for both in zip(leaves, keys, scans, strict=True)]  # one key per leaf
    )


def recursive_scan_split(param: Any, base_key: Any, scan_tuple: tuple[int, ...]) -> Any:
    """A key for every slice of ``param`` along the axes ``scan_tuple``.

    ``()``: the key itself. Otherwise the key is split into ``param.shape[scan_tuple[0]]`` keys, and each of them along
    the other axes. The axes are those of the whole parameter: ``(0, 1)`` for a stack of stacks.

    Returns:
        Keys with the leading shape ``[param.shape[axis] for axis in scan_tuple]``.
    """
    if not scan_tuple:
        return base_key
    keys = jax.random.split(base_key, param.shape[scan_tuple[0]])
    return jax.vmap(lambda key: recursive_scan_split(param, key, scan_tuple[1:]))(keys)
