"""How values take the place of a module's parameters for the length of a block, and how everything is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.parameters import Site, parameter_specs
from eggroll.torch.perturbed import Value
from eggroll.torch.state import Keeper


@contextmanager
def swapped(
    model: nn.Module, sites: Mapping[str, list[Site]], values: Mapping[str, Tensor], keeper: Keeper
) -> Iterator[None]:
    """Put values in the place of parameters for the length of the block; the parameters themselves stay untouched.

    Whatever else the model holds is given back as it was: caches made from a member's weights, running means, counters.

    Raises:
        UnsupportedOperationError: a parameter is not the one that the population was made with.
        StateLostError: the model changed a tensor of its own that cannot be put back.
    """
    for name in values:
        for site in sites[name]:
            _check_slot(name, site)
    with _batched_experts(model):
        state, done = keeper.state(), False
        try:
            place(sites, values)
            yield
            done = True
        finally:
            for name in values:
                for site in sites[name]:
                    site.module._parameters[site.attribute] = site.parameter
            state.restore(strict=done)


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
