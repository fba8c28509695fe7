"""What a case of the zoo is: a plain module, and inputs for any number of its members."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class NoCaseError(Exception):
    """The plain module cannot be built or run here, so there is nothing to compare with."""


@dataclass
class Built:
    """A module ready to be run.

    Attributes:
        model: in evaluation mode, with weights that all matter.
        inputs: ``inputs(member, rows)`` makes one member's own plain inputs.
        batch_dims: for each leaf of the inputs, the dimension of the batch; ``None`` where all members share it.
        batch_dim: of the population (``Population(batch_dim=...)``).
        rows: how many rows a member has in the first and in the second batching.
        generates: greedy generation is compared as well.
    """

    model: nn.Module
    inputs: Callable[[int, int], Inputs]
    batch_dims: Sequence[int | None]
    batch_dim: int = 0
    rows: tuple[int, int] = (2, 1)
    generates: bool = False

    def joint(self, own: Sequence[Inputs]) -> Inputs:
        """The inputs of all members, one after the other in the batch dimension."""
        flat = [tree_flatten(inputs) for inputs in own]
        leaves = [
            parts[0] if dim is None else torch.cat(parts, dim)
            for dim, parts in zip(self.batch_dims, zip(*(leaves for leaves, _ in flat), strict=True), strict=True)
        ]
        return tree_unflatten(leaves, flat[0][1])


@dataclass(frozen=True)
class Case:
    """One line of the table: where it is from, what it is called, and how it is made."""

    name: str
    build: Callable[[], Built]
    what: str = field(default="", compare=False)


@torch.no_grad()
def fill(model: nn.Module) -> nn.Module:
    """Weights under which every parameter matters: small ones grow to 1 / sqrt(fan in), none stays at zero or one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.ndim > 1 and float(parameter.std(correction=0)) < 0.03:
            parameter.copy_(noise * 0.7 * (parameter[0].numel() ** -0.5))
        else:
            parameter.add_(noise * (0.1 if parameter.ndim <= 1 else 0.03))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def fresh(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model but its configuration, which takes long to copy."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return copy.deepcopy(model, configs)


def vary(member: int, tree: Any) -> Any:
    """Floating inputs that are other ones for every member."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or member == 0 or not x.is_floating_point():
            return x
        return x + 0.3 * torch.sin(torch.arange(x.numel(), dtype=x.dtype).view(x.shape) * (member + 1))

    return tree_map(one, tree)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another precision, everything else as it is."""
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)
