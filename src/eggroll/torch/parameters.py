"""The parameters of a module as the noise sees them: names, shapes, kinds, and the places where they are used."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eggroll.core.select import Kind, ParameterSpec

_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def parameter_specs(model: nn.Module) -> list[ParameterSpec]:
    """Name, shape, kind and dtype of every parameter, tied ones once, under their first name."""
    owners: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[f"{prefix}.{name}" if prefix else name] = module
    return [
        ParameterSpec(name, tuple(parameter.shape), _kind(name, parameter, owners.get(name)), _dtype(parameter))
        for name, parameter in model.named_parameters()
    ]


def _dtype(parameter: Tensor) -> str:
    """The dtype's name."""
    return str(parameter.dtype).removeprefix("torch.")


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
