"""Taking over the quantized weights of a loaded model, whoever made them, and giving them back for saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from eggroll.torch.quantized.grid import Grid
from eggroll.torch.quantized.tensor import as_parameter, grid_of
from eggroll.torch.quantized.torchao import TorchaoGrid


def adopt(model: nn.Module) -> int:
    """Put a :class:`QuantizedTensor` in the place of every quantized weight that can be moved. Returns how many.

    The model computes what it computed before; codes stay in the memory that they are in.
    """
    taken: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) not in taken and TorchaoGrid.takes(weight):
                taken[id(weight)] = as_parameter(TorchaoGrid(weight.data))
            if id(weight) in taken:
                module._parameters[name] = taken[id(weight)]
    return len(taken)


def grids(model: nn.Module) -> dict[str, Grid]:
    """The quantized weights of a model that were taken over, tied ones once, by the parameter's name."""
    found = {name: grid_of(parameter) for name, parameter in model.named_parameters()}
    return {name: grid for name, grid in found.items() if grid is not None}


@contextmanager
def released(model: nn.Module) -> Iterator[None]:
    """Within the block, the libraries' own tensors are back in their places, as they are now: for saving."""
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                grid = grid_of(weight)
                if grid is not None:
                    before.append((module, name, weight))
                    module._parameters[name] = nn.Parameter(grid.original(), requires_grad=False)
        yield
    finally:
        for module, name, weight in before:
            module._parameters[name] = weight
