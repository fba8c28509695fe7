"""How values take the place of a module's parameters for the length of a block, and how everything is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.parameters import Site, parameter_specs
from eggroll.torch.perturbed import Value


@contextmanager
def swapped(
    model: nn.Module, sites: Mapping[str, list[Site]], values: Mapping[str, Tensor], *, single: bool
) -> Iterator[None]:
    """Put values in the place of parameters for the length of the block; the parameters themselves stay untouched.

    Modules that keep something in their attributes or buffers during the block get those back as they were where it
    means nothing afterwards: values, and whatever tensors a single member leaves (caches made from its weights).

    Raises:
        UnsupportedOperationError: a parameter is not the one that the population was made with.
    """
    for name in values:
        for site in sites[name]:
            _check_slot(name, site)
    with _batched_experts(model):
        kept = Kept(model)
        try:
            place(sites, values)
            yield
        finally:
            for name in values:
                for site in sites[name]:
                    site.module._parameters[site.attribute] = site.parameter
            kept.restore(lambda tensor: single or _is_member(tensor))


def _is_member(tensor: Tensor) -> bool:
    return isinstance(tensor, Value) or getattr(tensor, "_is_member", False)


def _check_slot(name: str, site: Site) -> None:
    current = site.module._parameters.get(site.attribute)
    if current is site.parameter:
        return
    if current is not None and _is_member(current):
        raise UnsupportedOperationError(
            f"parameter {name!r} is perturbed by another population already; leave its block before the next"
        )
    raise UnsupportedOperationError(
        f"parameter {name!r} was replaced since the population was made (resized, converted, merged or loaded anew): "
        "make a new Population of the model"
    )


def place(sites: Mapping[str, list[Site]], values: Mapping[str, Tensor]) -> None:
    """Write values into a module's slots, recurrent layers' own lists included."""
    recurrent = set()
    for name, value in values.items():
        # isinstance(value, nn.Parameter) holds, as for what it replaces.
        value._is_param = True  # type: ignore[attr-defined]
        value._is_member = True  # type: ignore[attr-defined]
        for site in sites[name]:
            site.module._parameters[site.attribute] = value  # type: ignore[assignment]
            if isinstance(site.module, nn.RNNBase):
                recurrent.add(site.module)
    for module in recurrent:
        # nn.LSTM and its relatives hand over a list that they made when they were built.
        module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]  # type: ignore[misc]


class Kept:
    """What the modules of a model hold in attributes, buffers and slots at one moment (references, no copies)."""

    def __init__(self, model: nn.Module) -> None:
        self._held = {
            module: (dict(module.__dict__), dict(module._buffers), dict(module._parameters))
            for module in model.modules()
            if not isinstance(module, torch.jit.ScriptModule)
        }

    def restore(self, is_undone: Callable[[Tensor], bool]) -> None:
        """Give back everything to modules that hold a new tensor for which ``is_undone``.

        Everything, because attributes belong together: a cache and the flag that says that it is filled.
        """
        for module, (attributes, buffers, parameters) in self._held.items():
            if isinstance(module, nn.RNNBase):
                # Lists of its weights (and of references to them) that it makes anew when it finds other weights.
                for name in ("_flat_weights", "_flat_weight_refs"):
                    if name in attributes:
                        module.__dict__[name] = attributes[name]
            now: list[tuple[dict[str, Any], dict[str, Any]]] = [
                (module.__dict__, attributes),
                (module._buffers, buffers),
                (module._parameters, parameters),
            ]  # type: ignore[list-item]
            if any(_has_new(held, before, is_undone) for held, before in now):
                _give_back(now)

    def restore_all(self) -> None:
        """Give back everything to every module, whatever it holds now."""
        for module, (attributes, buffers, parameters) in self._held.items():
            _give_back(
                [(module.__dict__, attributes), (module._buffers, buffers), (module._parameters, parameters)]  # type: ignore[list-item]
            )


def _give_back(held_and_before: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for held, before in held_and_before:
        held.update(before)
        for key in held.keys() - before.keys():
            del held[key]


def _has_new(held: Mapping[str, Any], before: Mapping[str, Any], is_undone: Callable[[Tensor], bool]) -> bool:
    return any(
        isinstance(tensor, Tensor) and tensor is not before.get(key) and is_undone(tensor)
        for key, tensor in held.items()
    )


@contextmanager
def _batched_experts(model: nn.Module) -> Iterator[None]:
    """Hugging Face mixtures regroup tokens by expert unless asked for their batched form, which keeps the rows."""
    change: Callable[[str], None] | None = getattr(model, "set_experts_implementation", None)
    previous = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if change is None or previous in (None, "batched_mm") or not _has_experts(model):
        yield
        return
    change("batched_mm")
    try:
        yield
    finally:
        change(previous)


def _has_experts(model: nn.Module) -> bool:
    return any(spec.kind == "experts" for spec in parameter_specs(model))
