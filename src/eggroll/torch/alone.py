"""One member alone: the plain model with plain weights, whatever it does to them, and nothing of it is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eggroll.torch.active import PerturbedModel
from eggroll.torch.parameters import Slot
from eggroll.torch.swap import Kept, place


@contextmanager
def alone(population: PerturbedModel, generation: int, index: int, *, sigma: float | None) -> Iterator[nn.Module]:
    """Inside the block, the model is one member, with weights made for the block, which it may write to.

    Some models rescale their weights at the first call (RWKV-4), or keep running means in buffers. What a member
    changes, the next one must not find: parameters that are not perturbed and buffers are copies too (all of them for
    the first member, then those that were written to), and attributes are as before afterwards, flags included.
    """
    model = population.model
    kept = Kept(model)
    try:
        with population.member(generation, index, sigma=sigma, materialize=True):
            copies = _copies(population)
            try:
                yield model
            finally:
                if population.written is None:
                    population.written = {slot for slot, (own, copy) in copies.items() if not _same(own, copy)}
    finally:
        kept.restore_all()


def _copies(population: PerturbedModel) -> dict[Slot, tuple[Tensor, Tensor]]:
    """Put copies in the place of what is not perturbed: originals and copies by their slot."""
    perturbed = {spec.name for spec in population.specs}
    copies: dict[Slot, tuple[Tensor, Tensor]] = {}
    for name, sites in population.sites.items():
        slots = [(site.module, site.attribute) for site in sites]
        if name in perturbed or not sites or not _is_wanted(population, slots):
            continue
        own = sites[0].parameter.detach()
        copy = own.clone()
        place(population.sites, {name: copy})
        copies.update(dict.fromkeys(slots, (own, copy)))
    for module in population.model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and _is_wanted(population, [(module, name)]):
                module._buffers[name] = copy = buffer.clone()
                copies[module, name] = buffer, copy
    return copies


def _is_wanted(population: PerturbedModel, slots: list[Slot]) -> bool:
    return population.written is None or not population.written.isdisjoint(slots)


def _same(own: Tensor, copy: Tensor) -> bool:
    return own.shape == copy.shape and bool(((own == copy) | (own != own)).all())
