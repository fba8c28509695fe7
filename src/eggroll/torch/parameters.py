"""The parameters of a module as the noise sees them, and how they are swapped for values and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.core.select import Kind, ParameterSpec
from eggroll.errors import UnsupportedOperationError
from eggroll.torch.values import Value

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
def swapped(model: nn.Module, sites: Mapping[str, list[Site]], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put values in the place of parameters for the length of the block; the parameters themselves stay untouched.

    What the model keeps in attributes and buffers during the block is put back too where it holds values, which mean
    nothing afterwards.

    Raises:
        UnsupportedOperationError: a parameter is not the one that the population was made with.
    """
    for name in values:
        for site in sites[name]:
            _check_slot(name, site)
    flat_weights = _flat_weights(sites, values)
    kept = kept_tensors(model)
    try:
        place(sites, values)
        yield
    finally:
        for name in values:
            for site in sites[name]:
                site.module._parameters[site.attribute] = site.parameter
        for module, original in flat_weights:
            module._flat_weights = original
        restore_tensors(model, kept, only_values=True)


def _check_slot(name: str, site: Site) -> None:
    current = site.module._parameters.get(site.attribute)
    if current is site.parameter:
        return
    if isinstance(current, Value) or getattr(current, "_is_member", False):
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


def _flat_weights(sites: Mapping[str, list[Site]], values: Mapping[str, Tensor]) -> list[tuple[nn.RNNBase, list]]:
    modules = {site.module for name in values for site in sites[name] if isinstance(site.module, nn.RNNBase)}
    return [(module, module._flat_weights) for module in modules]


Kept = dict[nn.Module, tuple[dict[str, Any], dict[str, Any]]]


def kept_tensors(model: nn.Module) -> Kept:
    """What a model's modules hold in plain attributes and buffers (references, no copies)."""
    return {module: (dict(module.__dict__), dict(module._buffers)) for module in model.modules()}


def restore_tensors(model: nn.Module, kept: Kept, *, only_values: bool) -> None:
    """Undo assignments to attributes and buffers: of all tensors, or of values (old-style weight_norm, caches)."""
    for module, befores in kept.items():
        for held, before in zip((module.__dict__, module._buffers), befores, strict=True):
            for key in [key for key, now in held.items() if isinstance(now, Tensor)]:
                if held[key] is before.get(key) or (only_values and not isinstance(held[key], Value)):
                    continue
                if key in before:
                    held[key] = before[key]
                else:
                    del held[key]


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
