"""PyTorch's own collection of modules, ``torch.testing._internal.common_modules.module_db``, with its own inputs."""

from __future__ import annotations

import copy
import sys
import types
import unittest
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .case import Built, Case, Inputs, NoCaseError, fill, vary

SEED = 3
MOST = 40
"""Cases of one module at most, evenly chosen: one loss has hundreds that differ in a reduction."""


class Scaled(nn.Module):
    """A module without parameters behind a perturbed scale of its first floating input."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.full((width,), 0.6))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's outputs."""
        leaves, form = tree_flatten((args, kwargs))
        slot = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point())
        leaves[slot] = leaves[slot] * self.scale
        args, kwargs = tree_unflatten(leaves, form)
        return self.inner(*args, **kwargs)


def collection() -> Any:
    """``module_db``; it imports a package for its tests' expectations, which is not needed here."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            stand_in = types.ModuleType("expecttest")
            stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
            sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_modules import module_db

    return module_db


def cases(modules: Collection[str] | None = None) -> Iterator[Case]:
    """One case for each module (or for some, by name) and each of its inputs, up to ``MOST``."""
    for info in collection():
        if modules is not None and info.name not in modules:
            continue
        inputs = _inputs(info)
        few = min(len(inputs), MOST)
        for index in (i * len(inputs) // few for i in range(few)):
            given = inputs[index]
            yield Case(f"torch/{info.name}/{index}", partial(_build, info, index), given.desc or "default")


def _inputs(info: Any) -> list[Any]:
    torch.manual_seed(SEED)
    try:
        return info.module_inputs_func(info, "cpu", torch.float32, False, False)
    except Exception:
        return []  # a module that cannot be made on this device


def _build(info: Any, index: int) -> Built:
    given = _inputs(info)[index]
    if given.forward_input is None:
        raise NoCaseError("the collection has no inputs for it")
    torch.manual_seed(SEED)
    try:
        model = info.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)
        plain: Inputs = (tuple(given.forward_input.args), dict(given.forward_input.kwargs))
        if info.is_lazy:
            model.eval()(*plain[0], **plain[1])
    except Exception as error:
        raise NoCaseError(f"it cannot be made: {type(error).__name__}: {error}") from error
    if not list(model.parameters()):
        first = next((x for x in tree_flatten(plain)[0] if isinstance(x, Tensor) and x.is_floating_point()), None)
        if first is None or first.ndim == 0:
            raise NoCaseError("it has no parameters and no floating inputs")
        model = Scaled(model, first.shape[-1])
    model = fill(model)
    dim, dims = _batch(model, plain, is_unbatched="no_batch_dim" in given.desc)
    return Built(model, lambda p, rows: vary_in_range(p, plain), dims, batch_dim=min(dim, 1))


def vary_in_range(member: int, plain: Inputs) -> Inputs:
    """Other inputs for every member, where the module's inputs may be anything (probabilities stay probabilities)."""
    leaves = [x for x in tree_flatten(plain)[0] if isinstance(x, Tensor) and x.is_floating_point()]
    if any(x.numel() and float(x.min()) >= 0.0 for x in leaves):
        leaves, form = tree_flatten(plain)
        leaves = [x * (1 - 0.05 * member) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
        return tree_unflatten(leaves, form)
    return vary(member, plain)


def _batch(model: nn.Module, plain: Inputs, *, is_unbatched: bool) -> tuple[int, list[int | None]]:
    """Where the inputs hold the batch: the dimension that two batches can be joined in, with the outputs joined too."""
    leaves, form = tree_flatten(plain)
    other = tree_flatten(vary_in_range(1, plain))[0]
    try:
        apart = [_outputs(copy.deepcopy(model), tree_unflatten(x, form)) for x in (leaves, other)]
    except Exception as error:
        raise NoCaseError(f"the plain module does not run: {type(error).__name__}: {error}") from error
    first = next((x for x in leaves if isinstance(x, Tensor) and x.ndim > 0), None)
    for dim in range(0 if first is None else min(first.ndim, 2)):
        assert first is not None
        size = first.shape[dim]
        dims = [_dim_of(x, dim, size) for x in leaves]
        pairs = zip(leaves, other, dims, strict=True)
        joint = [a if d is None else torch.cat((a, b), d) for a, b, d in pairs]
        try:
            together = _outputs(copy.deepcopy(model), tree_unflatten(joint, form))
        except Exception:
            continue
        if len(together) == len(apart[0]) and all(
            _are_joined(mine, a, b) for mine, a, b in zip(together, *apart, strict=True)
        ):
            return dim, dims
    if is_unbatched or any(x.ndim for x in apart[0]):
        raise NoCaseError("its inputs have no batch dimension")
    # A mean over the batch: members are joined in the first dimension.
    dims = [0 if isinstance(x, Tensor) and x.ndim > 0 else None for x in leaves]
    joint = [a if d is None else torch.cat((a, b), d) for a, b, d in zip(leaves, other, dims, strict=True)]
    try:
        _outputs(copy.deepcopy(model), tree_unflatten(joint, form))
    except Exception as error:
        raise NoCaseError("its inputs have no batch dimension") from error
    return 0, dims


def _dim_of(x: Any, dim: int, size: int) -> int | None:
    if not isinstance(x, Tensor):
        return None
    if x.ndim > dim and x.shape[dim] == size:
        return dim
    return next((d for d, s in enumerate(x.shape) if s == size), None)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in tree_flatten(model(*inputs[0], **inputs[1]))[0] if isinstance(x, Tensor)]


def _are_joined(together: Tensor, a: Tensor, b: Tensor) -> bool:
    for dim in range(min(a.ndim, 2)):
        if a.shape[:dim] == b.shape[:dim] and a.shape[dim + 1 :] == b.shape[dim + 1 :]:
            joint = torch.cat((a, b), dim)
            if joint.shape == together.shape and torch.allclose(joint, together, atol=1e-5, equal_nan=True):
                return True
    return False
