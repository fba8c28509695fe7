"""The parameters of a module as the noise sees them, and how they are swapped for values and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eggroll.core.select import Kind, ParameterSpec

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def parameter_specs(model: nn.Module) -> list[ParameterSpec]:
    """Name, shape and kind of every parameter, tied ones once, under their first name."""
    owners: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        for name in module._parameters:
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
    """Every place of every parameter, under the parameter's first name."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    sites: dict[str, list[Site]] = {name: [] for name in first_name.values()}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                sites[first_name[id(parameter)]].append(Site(module, attribute, parameter))
    return sites


@contextmanager
def swapped(sites: Mapping[str, list[Site]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put values in the place of parameters for the length of the block; the parameters themselves stay untouched."""
    flat_weights = _flat_weights(sites, values)
    try:
        place(sites, values)
        yield
    finally:
        for name in values:
            for site in sites[name]:
                site.module._parameters[site.attribute] = site.parameter
        for module, original in flat_weights:
            module._flat_weights = original


def place(sites: Mapping[str, list[Site]], values: Mapping[str, Tensor]) -> None:
    """Write values into a module's slots, recurrent layers' own lists included."""
    recurrent = set()
    for name, value in values.items():
        for site in sites[name]:
            site.module._parameters[site.attribute] = value  # type: ignore[assignment]
            if isinstance(site.module, nn.RNNBase):
                recurrent.add(site.module)
    for module in recurrent:
        # nn.LSTM and its relatives hand over a list that they made when they were built.
        module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]  # type: ignore[misc]


def _flat_weights(sites: Mapping[str, list[Site]], values: Mapping[str, Tensor]) -> list[tuple[nn.RNNBase, list]]:
    modules = {site.module for name in values for site in sites[name] if isinstance(site.module, nn.RNNBase)}
    return [(module, module._flat_weights) for module in modules]


def training_hazards(model: nn.Module) -> list[str]:
    """Names of active modules whose training mode would mix members or draw noise of its own."""
    hazards = []
    for name, module in model.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0
        mixing = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.training and (random or mixing):
            hazards.append(f"{name} ({type(module).__name__})")
    return hazards


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter."""
    return next(model.parameters()).device
