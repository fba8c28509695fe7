"""Taking over the quantized weights of a loaded model, whoever made them, and giving them back for saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.quantized.formats import find, known
from eggroll.torch.quantized.grid import Grid, ModuleGrid
from eggroll.torch.quantized.tensor import as_parameter, grid_of


def adopt(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Put a :class:`QuantizedTensor` in the place of every quantized weight. Returns how many.

    A format that lives in a module of its own gets an ``nn.Linear`` in that module's place, whose weight is the
    quantized one, with its shape ``(m, n)``. The model computes what it computed before; codes stay in the memory that
    they are in.

    Args:
        model: loaded, and for compressed-tensors not called yet.
        dtype: of the activations around the weights; that of the model's floating-point parameters by default.

    Raises:
        UnsupportedOperationError: weights are quantized in a format that cannot be moved, or the model itself is a
            quantized layer, which nothing can take the place of.
    """
    dtype = dtype or _dtype_of(model)
    found = find(model)
    refused = [layer for layer in found if layer.format is None]
    if refused:
        first = refused[0]
        raise UnsupportedOperationError(
            f"weights of {type(first.module).__name__} in layer {first.name!r} are quantized as {first.what}, which "
            f"cannot be moved; known: {known()}. Load a checkpoint in one of these, or one that is not quantized, with "
            "quantize='none' or a format of its own (quantize='int8', 'int4')"
        )
    if any(layer.module is model and layer.format is not None and layer.format.in_module for layer in found):
        raise UnsupportedOperationError(
            f"the model itself is a quantized {type(model).__name__}; put it into a module (nn.Sequential(layer)), so "
            "that another can take its place"
        )
    taken: dict[int, nn.Parameter] = {}
    modules: dict[int, nn.Module] = {}
    for layer in found:
        assert layer.format is not None
        weight = layer.weight
        key = id(layer.module) if weight is None else id(weight)
        if key not in taken:
            taken[key] = as_parameter(layer.format.grid(layer.module if layer.format.in_module else weight.data, dtype))
        if layer.format.in_module:
            modules[id(layer.module)] = _linear_of(layer.module, taken[key])
        else:
            layer.module._parameters[layer.attribute] = taken[key]
    _replace(model, modules)
    _keep_packed(model)
    return len(taken)


def grids(model: nn.Module) -> dict[str, Grid]:
    """The quantized weights of a model that were taken over, tied ones once, by the parameter's name."""
    found = {name: grid_of(parameter) for name, parameter in model.named_parameters()}
    return {name: grid for name, grid in found.items() if grid is not None}


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Within the block, the libraries' own tensors and modules are back in their places, as they are now.

    It is for saving. compressed-tensors' layers cannot be called there: their library would expand them.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    modules: dict[int, nn.Module] = {}
    originals: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            grid = grid_of(weight)
            if isinstance(grid, ModuleGrid):
                modules[id(module)] = _original_of(module, grid)
            elif grid is not None:
                before.append((module, name, weight))
                if id(weight) not in originals:  # tied weights stay tied
                    originals[id(weight)] = nn.Parameter(grid.original(), requires_grad=False)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for module, name, weight in before:
            module._parameters[name] = originals[id(weight)]
        replaced = _replace(model, modules)
        yield
    finally:
        for module, name, weight in before:
            module._parameters[name] = weight
        for parent, name, module in replaced:
            parent._modules[name] = module


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Of the first parameter in floating point that no layer keeps quantized; of quantized ones if there is none."""
    quantized = {id(layer.module) for layer in find(model)}
    plain = (
        p.dtype
        for module in model.modules()
        if id(module) not in quantized
        for p in module._parameters.values()
        if p is not None
    )
    wide = [dtype for dtype in plain if dtype.is_floating_point and dtype.itemsize > 1]
    wide += [p.dtype for p in model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1]
    return wide[0] if wide else torch.get_default_dtype()


def _linear_of(module: Any, weight: nn.Parameter) -> nn.Linear:
    m, n = weight.shape
    linear = nn.Linear(n, m, bias=False, device="meta")
    bias = getattr(module, "bias", None)
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)  # libraries that keep it as a buffer
    linear._parameters["weight"], linear._parameters["bias"] = weight, bias
    linear.quantized_module = (module,)  # type: ignore[assignment]  # in a tuple, so it is no part of the model
    return linear.train(module.training)


def _original_of(linear: Any, grid: ModuleGrid) -> nn.Module:
    """The library's module, with today's codes and bias."""
    module: Any = grid.restore(linear.quantized_module[0])
    bias = linear._parameters["bias"]
    if "bias" in module._parameters:
        module._parameters["bias"] = bias
    elif bias is not None:
        module.bias = bias.detach().to(module.bias.dtype)
    return module  # type: ignore[no-any-return]


def _replace(model: nn.Module, modules: dict[int, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put others in the place of submodules, wherever they are. Returns what was where."""
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent._modules.items()
        if child is not None and id(child) in modules
    ]
    for parent, name, child in places:
        parent._modules[name] = modules[id(child)]
    return places


def _keep_packed(model: nn.Module) -> None:
    """Take away what would expand the whole model at its first call (compressed-tensors)."""
    for module in model.modules():
        hook = module.__dict__.pop("ct_decompress_hook", None)
        if hook is not None:
            hook.remove()
