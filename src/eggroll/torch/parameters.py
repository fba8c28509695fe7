"""The parameters of a module as the noise sees them, and how they are swapped for values and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.core.select import Kind, ParameterSpec
from eggroll.errors import UnsupportedOperationError
from eggroll.torch.perturbed import Value

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def parameter_specs(model: nn.Module) -> list[ParameterSpec]:
    """Name, shape and kind of every parameter, tied ones once, under their first name."""
    owners: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[f"{prefix}.{name}" if prefix else name] = module
    return [
        ParameterSpec(name, tuple(parameter.shape), _kind(name, parameter, owners.get(name)))
        for name, parameter in model.named_parameters()
    ]


def _kind(name: str, parameter: Tensor, owner: nn.Module | None) -> Kind:
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) and parameter.ndim == 2:
        return "embedding"
    if isinstance(owner, _CONVOLUTIONS) and parameter.ndim >= 3:
        return "conv"
    if parameter.ndim == 2:
        return "matrix"
    if parameter.ndim <= 1:
        return "vector"
    # Mixtures of experts keep their matrices in one 3-D parameter of a module (or a path) that is named so.
    words = f"{type(owner).__name__}.{name}".lower()
    if parameter.ndim == 3 and ("expert" in words or "moe" in words):
        return "experts"
    return "other"


@dataclass(frozen=True)
class Site:
    """One place where a parameter is used: tied weights have several."""

    module: nn.Module
    attribute: str
    parameter: nn.Parameter


def parameter_sites(model: nn.Module) -> dict[str, list[Site]]:
    """Every place of every parameter, under the parameter's first name; those of TorchScript modules have none."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    sites: dict[str, list[Site]] = {name: [] for name in first_name.values()}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                sites[first_name[id(parameter)]].append(Site(module, attribute, parameter))
    return sites


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
                for held, before in now:
                    held.update(before)
                    for key in held.keys() - before.keys():
                        del held[key]


def _has_new(held: Mapping[str, Any], before: Mapping[str, Any], is_undone: Callable[[Tensor], bool]) -> bool:
    return any(
        isinstance(tensor, Tensor) and tensor is not before.get(key) and is_undone(tensor)
        for key, tensor in held.items()
    )


_RATES = (
    "drop_prob", "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "dropout_p", "dropout_prob",
    "resid_dropout", "embd_dropout", "layerdrop", "drop_path",
)  # fmt: skip


def training_hazards(model: nn.Module) -> list[str]:
    """Names of modules in training mode that would mix members, change buffers or draw noise of their own."""
    hazards = []
    for name, module in model.named_modules():
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            mixing = module.track_running_stats
        rates = [getattr(module, rate, None) for rate in _RATES]
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rates.append(module.p)
        random = any(isinstance(rate, float) and rate > 0.0 for rate in rates) or isinstance(module, nn.RReLU)
        if module.training and (random or mixing):
            hazards.append(f"{name} ({type(module).__name__})")
    return hazards


def batch_statistics(model: nn.Module) -> list[str]:
    """Names of modules that normalise over the batch in every mode, and so over all members together."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]
