"""The parameters of a module as the noise sees them: names, shapes, kinds, and the places where they are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eggroll.core.select import Kind, ParameterSpec
from eggroll.errors import UnsupportedOperationError

FORMS = {
    "UninitializedParameter": "has no shape yet (a lazy module): call the model once, then make its Population",
    "DTensor": "is split over devices (FSDP2, tensor parallelism): make the Population of the whole model in every "
    "process, and give each a part of the members",
    "FlatParameter": "holds the parameters of an FSDP module: make the Population of the whole model in every process, "
    "and give each a part of the members",
    "meta": "is on the meta device and has no numbers: load the weights first (from_pretrained without device_map, "
    "to_empty and load_state_dict)",
}


def refuse_unready(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that are no whole arrays of numbers in this process.

    Raises:
        UnsupportedOperationError: the first of them, and what to do.
    """
    for name, parameter in named:
        kinds = [base.__name__ for base in type(parameter).__mro__] + [type(parameter.data).__name__]
        form = next((kind for kind in kinds if kind in FORMS), "meta" if parameter.is_meta else None)
        if form is not None:
            raise UnsupportedOperationError(
                f"parameter {name!r} {FORMS[form]}, or leave it alone (exclude=[{name!r}])"
                if form != "UninitializedParameter"
                else f"parameter {name!r} {FORMS[form]}"
            )


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


Slot = tuple[nn.Module, str]
"""A parameter's or buffer's place: a module and a name in it."""


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
