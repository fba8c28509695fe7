"""Before a model's first call under a population: a few rows, to learn layouts from and to check against members alone.

The number of rows is one that no other dimension shares, so that sizes tell what holds the members
(:mod:`eggroll.torch.layout.rules` remembers it). Some of the members are then evaluated alone: a model that moves or
mixes its rows (sorts them, normalizes over the batch, concatenates in the batch dimension) is refused before it gives a
wrong result. What moves rows only for some inputs may pass; ``Population.verify`` checks the inputs it is given.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.compare import relative_difference
from eggroll.torch.compare import tolerance as rounding
from eggroll.torch.layout.outputs import Places
from eggroll.torch.layout.rows import Inputs, addresses, cut, fewer_rows, member_data, member_dim
from eggroll.torch.members import Members
from eggroll.torch.perturbed import MemberContext, MemberTensor, Value
from eggroll.torch.swap import Kept, place

# Whatever goes wrong with other inputs than the model is called with is no reason to refuse those.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

SIGMA_SHARE = 0.05
"""sigma of the check relative to the size of the weights: effects that stand out from rounding."""


def learn_and_check(
    population: Members,
    context: MemberContext,
    members: int,
    placed: Mapping[str, Tensor],
    module: nn.Module,
    inputs: Inputs,
) -> None:
    """Learn the layouts of a module's activations from a small call, and check it against members alone.

    Args:
        population: the members, of which some are tried.
        context: of the block that the call is made in.
        members: of that block.
        placed: the values that are in the place of parameters now, and again afterwards.
        module: what is called.
        inputs: of the call.

    Raises:
        UnsupportedOperationError: rows do not hold the members of this model.
    """
    share = None
    kept = Kept(population.model)
    own_rows = (context.rows or 0) // members
    known, tried = dict(population.layouts), list[int]()
    try:
        while len(tried) < TRIES:
            share, has_run, before = None, False, len(tried)
            population.layouts.clear()
            population.layouts.update(known)
            for own in (1, 2)[:own_rows]:  # a layer that takes no batch of one may take two
                with contextlib.suppress(_CannotRun), own_random_numbers(population):
                    probe = _Probe.of(population, context, module, inputs, own, tried[:before])
                    tried += [probe.count] if probe is not None else []
                    share = None if probe is None else probe.share_of_effect()
                    has_run = True
                    break
            if (has_run and share is None) or len(tried) == before:
                break
            # A size that the model makes of others (a pooled length) may have been the number of rows by chance.
    finally:
        kept.restore(lambda _: True)
        place(population.sites, placed)
    if share is not None:
        size = f"{share:.0%} of" if share < math.inf else "more than"
        raise UnsupportedOperationError(
            f"members evaluated together differ from the same members alone, by {size} what their perturbation does: "
            "this model moves or mixes the rows of a batch (sorting or regrouping them, statistics over the batch, "
            "concatenation in the batch dimension), or its activations do not hold the members in their leading "
            'dimension. Evaluate with population.forward and mode="vmap" or mode="loop"'
        )


@contextlib.contextmanager
def own_random_numbers(population: Members) -> Iterator[None]:
    """Inside the block, nothing is taken from the stream of random numbers, and nothing is recorded for gradients."""
    device = population.device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def sigma_for_checks(population: Members) -> float:
    """A sigma whose effect stands out from rounding: a part of the perturbed weights' size."""
    norms = [
        float(parameter.detach().square().mean(dtype=torch.promote_types(parameter.dtype, torch.float32)).sqrt())
        for parameter in (population.parameter(spec.name) for spec in population.specs)
        if parameter.numel()
    ]
    return SIGMA_SHARE * max(statistics.median(norms), 1e-6)


TRIES = 3
"""Small calls, of different numbers of rows, after which a model is refused."""


class _CannotRun(Exception):
    """The module does not take these inputs."""


@dataclass
class _Probe:
    """A call of a module with ``count`` members of ``own`` rows each."""

    population: Members
    context: MemberContext
    module: nn.Module
    inputs: Inputs
    count: int
    own: int
    sigma: float

    @classmethod
    def of(
        cls,
        population: Members,
        context: MemberContext,
        module: nn.Module,
        inputs: Inputs,
        own: int,
        avoid: Collection[int] = (),
    ) -> _Probe | None:
        """A probe whose number of rows divides few other sizes; ``None`` if inputs hold state that a call changes."""
        sizes = {size for parameter in population.model.parameters() for size in parameter.shape}
        fewer = fewer_rows(inputs, context.rows or 0, population.batch_dim, sizes, own, avoid)
        if fewer is None:
            return None
        sigma = max(sigma_for_checks(population), population.sigma)
        return cls(population, context, module, fewer[1], fewer[0], own, sigma)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.count * self.own

    def member(self, p: int) -> int:
        """Which member the ``p``-th place of the call is: all of them, in an order that is no palindrome."""
        held = min(self.count, self.population.population_size)
        return p % held or int(p == self.count - 1)

    def share_of_effect(self) -> float | None:
        """How far rows are from members alone, relative to how far members are from each other; ``None`` if equal."""
        population = self.population
        held = range(min(self.count, population.population_size))
        context = replace(self.context, members=len(held), rows=self.rows, layouts={}, trusting=True)
        context.inputs = addresses(tree_flatten(self.inputs)[0])
        index = torch.tensor([self.member(p) for p in range(self.count)], device=population.device)
        values = population.values(0, held, context, sigma=self.sigma)
        context.members = self.count
        place(population.sites, {name: value.chosen(index) for name, value in values.items()})  # type: ignore[attr-defined]
        before = _random_state(population)
        try:
            together = self._call(*self.inputs)
        finally:
            population.layouts.update(context.layouts)
        if not torch.equal(before, _random_state(population)):
            return None  # a model that draws random numbers cannot be compared
        if any("forward" in module.__dict__ for module in self.module.modules()):
            return None  # nor one whose parts were replaced from outside: they may not depend on the inputs
        shares = [share for p in sorted({0, 1, self.count // 2, self.count - 1}) for share in self._shares(p, together)]
        return max(shares, default=None)

    def _shares(self, p: int, together: Any) -> list[float]:
        """The outputs of one member that differ from it alone by more than rounding, and by how much."""
        outputs = self._alone(p, self.member(p))
        alone, joint_leaves = tree_flatten(outputs)[0], tree_flatten(together)[0]
        found = []
        if len(joint_leaves) != len(alone):
            places = Places.of(outputs, together, self.own, self.count, self.population.batch_dim)
            if places is None:
                return []  # of another form for other rows: nothing to compare
            # The entries of a list that has one for each row are the member's own.
            joint_leaves = tree_flatten(places.own_entries(together, p, self.count, self.rows))[0]
        for position, (joint, mine) in enumerate(zip(joint_leaves, alone, strict=True)):
            if not isinstance(mine, Tensor) or not mine.is_floating_point():
                continue
            if isinstance(joint, MemberTensor):
                got = member_data(joint, self.count, self.rows)[p]
            elif len(alone) < len(tree_flatten(together)[0]) and joint.shape == mine.shape:
                got = joint
            elif not isinstance(joint, Value) and member_dim(joint, self.rows, self.population.batch_dim) is not None:
                got = cut(joint, p, self.count, self.rows, self.population.batch_dim)
            else:
                continue  # shared by all members, or a statistic of them all
            precision = self._precision(mine)
            if got.shape != mine.shape or relative_difference(got, mine) <= rounding(precision):
                continue
            held = min(self.count, self.population.population_size)
            other = tree_flatten(self._alone(p, (self.member(p) + 1) % held))[0][position]
            effect = float((other.double() - mine.double()).norm()) if other.shape == mine.shape else 0.0
            share = float((got.double() - mine.double()).norm()) / effect if effect > 0.0 else math.inf
            if share > ALLOWED_SHARE.get(precision, 0.5):
                found.append(share)
        return found

    def _alone(self, p: int, member: int) -> Any:
        """The outputs of one member for the inputs of the ``p``-th place."""
        population = self.population
        values = population.values(0, range(member, member + 1), MemberContext(None), sigma=self.sigma)
        place(population.sites, values)
        return self._call(*cut(self.inputs, p, self.count, self.rows, population.batch_dim))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self.module(*args, **kwargs)
        except FAILURES as error:
            raise _CannotRun from error

    def _precision(self, x: Tensor) -> torch.dtype:
        """The dtype whose rounding an output has seen: the narrowest of its own and the parameters'."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        dtypes = {x.dtype, *(self.population.parameter(spec.name).dtype for spec in self.population.specs)}
        return min((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: -torch.finfo(dtype).eps)


ALLOWED_SHARE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Rounding is amplified from layer to layer; a wrong layout is off by the whole effect of a perturbation."""


def _random_state(population: Members) -> Tensor:
    device = population.device
    if device.type == "cuda":
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])
    return torch.get_rng_state()
