"""The ways to evaluate a population (rows, ``torch.vmap``, one member at a time), and the check of the first."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.active import PerturbedModel
from eggroll.torch.compare import largest_difference
from eggroll.torch.layout.probe import PLAIN_BYTES, originals_of, refuse_bypassed, sigma_for_checks
from eggroll.torch.layout.rows import Inputs, count_rows, cut, join, member_dim, plain_outputs
from eggroll.torch.layout.watch import Watch
from eggroll.torch.padding import padding_as_in_plain_models
from eggroll.torch.perturbed import MemberContext, MemberTensor, PerturbedWeight
from eggroll.torch.state import random_numbers_kept

# Whatever the reason that a mode cannot run a model, another one may.
FAILURES = (UnsupportedOperationError, RuntimeError, ValueError, TypeError, IndexError, AssertionError)
# In 16 bit, rounding is amplified from layer to layer, so that no fixed tolerance tells it from a wrong layout. What
# does is the size of the perturbation's own effect: with sigma at this part of the weights' size, rounding stays far
# below it (a sixth on a 30-layer model in bfloat16), and members in the wrong rows are off by all of it.
VERIFY_SHARE_16_BIT = 0.5


@dataclass(frozen=True)
class Call:
    """One forward of a population: inputs, members, and how strongly they are perturbed."""

    population: PerturbedModel
    inputs: Inputs
    generation: int
    members: Sequence[int]
    sigma: float | None

    @property
    def rows(self) -> int:
        """R, read off the inputs."""
        return count_rows(self.inputs, len(self.members), self.population.batch_dim)

    def own(self, p: int) -> Inputs:
        """The inputs of the ``p``-th member alone; of what all share, it gets a copy that it may write to."""
        own = cut(self.inputs, p, len(self.members), self.rows, self.population.batch_dim)
        return tree_map(self._own_copy, own) if len(self.members) > 1 else own

    def _own_copy(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.clone() if member_dim(x, self.rows // len(self.members), self.population.batch_dim) is None else x
        length = getattr(x, "get_seq_length", None)
        if length is None:
            return x
        if int(length() or 0) > 0:
            raise UnsupportedOperationError(
                f"the inputs hold a {type(x).__name__} that all members have written to, which cannot be cut into "
                "theirs: begin with an empty one, or evaluate one member with population.member"
            )
        return copy.deepcopy(x)

    def alone(self, p: int, *, plain: bool = False) -> Any:
        """The outputs of the ``p``-th member alone, with ``plain`` tensors as its weights or with values."""
        args, kwargs = self.own(p)
        with self.population.member(self.generation, self.members[p], sigma=self.sigma, materialize=plain) as model:
            return model(*args, **kwargs)

    def plain(self, p: int) -> Any:
        """The ``p``-th member as :meth:`alone`, with plain weights if these are neither too large nor of 16 bits."""
        sizes = [p.numel() * p.element_size() for p in map(self.population.parameter, self.population.names)]
        return self.alone(p, plain=sum(sizes) <= PLAIN_BYTES and not _is_half(self.population))

    def watch(self) -> None:
        """Once for each population: refuse a model that uses the parameters themselves instead of the values."""
        population = self.population
        if population.watched:
            return
        seen = Watch(MemberContext(None), originals_of(population))
        args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.own(0))
        with contextlib.suppress(*FAILURES), population.member(self.generation, self.members[0]) as model, seen:
            model(*args, **kwargs)
        refuse_bypassed(seen.bypassed)
        population.watched = True


def run_rows(call: Call, *, trusting: bool = False) -> Any:
    """All members in one forward, as rows of one batch."""
    population, (args, kwargs) = call.population, call.inputs
    with population.perturbed(call.generation, call.members, sigma=call.sigma) as active:
        active.context.trusting = trusting
        outputs = population.model(*args, **kwargs)
    if active.context.single:
        return outputs
    return plain_outputs(outputs, len(call.members), call.rows, population.batch_dim)


def run_loop(call: Call) -> Any:
    """One member after the other, as values or, where an operation does not take these, with plain weights."""
    call.watch()
    population, members = call.population, range(len(call.members))
    if not population.plain_loop:
        try:
            return join([call.alone(p) for p in members], population.batch_dim)
        except UnsupportedOperationError:
            outputs = join([call.alone(p, plain=True) for p in members], population.batch_dim)
            population.plain_loop = True
            return outputs
    return join([call.alone(p, plain=True) for p in members], population.batch_dim)


def run_vmap(call: Call) -> Any:
    """All members by ``torch.vmap``, which knows where they are in every tensor, whatever the layout."""
    call.watch()
    population, count, rows = call.population, len(call.members), call.rows
    batch_dim = population.batch_dim
    sigma = population.sigma if call.sigma is None else call.sigma
    population.check(call.members)
    values = population.values(call.generation, call.members, MemberContext(count), sigma=sigma)
    single = MemberContext(None)
    parts: dict[str, tuple[Tensor, ...]] = {}
    for name, value in values.items():
        if isinstance(value, PerturbedWeight):
            parts[name] = (value.a, value.b)
        else:
            assert isinstance(value, MemberTensor)
            parts[name] = (value.data_P,)

    def split(x: Any) -> Any:
        dim = member_dim(x, rows, batch_dim)
        return x if dim is None else x.unflatten(dim, (count, -1))

    inputs = tree_map(split, call.inputs)
    dims = tree_map(lambda x: member_dim(x, rows, batch_dim), call.inputs)

    others: dict[int, Any] = {}  # what is no tensor among the outputs, by its place
    structures: dict[str, Any] = {}

    def one(member_parts: dict[str, tuple[Tensor, ...]], member_inputs: Inputs) -> Any:
        own: dict[str, Tensor] = {}
        for name, pieces in member_parts.items():
            value = values[name]
            if isinstance(value, PerturbedWeight):
                own[name] = PerturbedWeight(value.base, *pieces, name=name, kind=value.kind, context=single)
            else:
                own[name] = pieces[0]
        with population.swapped(own), padding_as_in_plain_models(population.model):
            leaves, structures["outputs"] = tree_flatten(population.model(*member_inputs[0], **member_inputs[1]))
        others.update((slot, leaf) for slot, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    state = population.keeper.state()
    try:
        with random_numbers_kept(population.device):
            tensors = torch.vmap(one, in_dims=(0, dims), randomness="error")(parts, inputs)
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        raise UnsupportedOperationError(
            'the model draws random numbers, which mode="vmap" does not give to each member: use mode="loop"'
        ) from error
    finally:
        state.restore(strict=False)  # tensors of the vmap mean nothing after it
    outputs = []
    for p in range(count):
        leaves = [tensor[p] for tensor in tensors]
        for slot, leaf in sorted(others.items()):
            leaves.insert(slot, leaf)
        outputs.append(tree_unflatten(leaves, structures["outputs"]))
    return join(outputs, batch_dim)


RUNS: dict[str, Callable[[Call], Any]] = {"rows": run_rows, "vmap": run_vmap, "loop": run_loop}


def run_auto(call: Call) -> tuple[str, Any]:
    """The first mode that works and agrees with single members, and the outputs."""
    call.watch()
    with contextlib.suppress(*FAILURES):
        verify(call)
        return "rows", run_rows(call)
    with contextlib.suppress(*FAILURES):
        out = run_vmap(call)
        if difference(call, out)[1]:
            return "vmap", out
    out = run_loop(call)
    if not call.population.plain_loop and not difference(call, out)[1]:
        call.population.plain_loop = True
        out = run_loop(call)
    return "loop", out


def difference(call: Call, out: Any) -> tuple[float, bool]:
    """Largest relative difference between joint outputs and some members alone, and whether it is within rounding."""
    count = len(call.members)
    found = []
    with torch.no_grad():
        for p in sorted({0, count // 2, count - 1}):
            got = cut(out, p, count, call.rows, call.population.batch_dim)
            expected = call.plain(p)
            if len(tree_flatten(got)[0]) != len(tree_flatten(expected)[0]):
                return float("inf"), False
            found.append(largest_difference(_scalars_of(got, expected, p, count), expected))
    return max(d for d, _ in found), all(close for _, close in found)


def _scalars_of(got: Any, expected: Any, p: int, members: int) -> Any:
    """Scalars of all members stand side by side in ``(P,)``, and were cut already where every member has one row."""

    def one(mine: Any, theirs: Any) -> Any:
        if not isinstance(theirs, Tensor) or theirs.ndim > 0 or mine.ndim != 1:
            return mine
        return mine[p if len(mine) == members else 0]

    return tree_map(one, got, expected)


def verify(call: Call) -> float:
    """Check rows against some members alone; see :meth:`eggroll.torch.Population.verify`."""
    population = call.population
    is_half = _is_half(population)
    if call.sigma is None and is_half:
        call = replace(call, sigma=sigma_for_checks(population))
    with torch.no_grad():
        layouts = dict(population.layouts)
        out = run_rows(call, trusting=True)
        worst, close = difference(call, out)
        if not close and is_half and math.isfinite(worst):
            worst = _share_of_effect(call, out)
            close = worst <= VERIFY_SHARE_16_BIT
    if not close:
        population.layouts.clear()
        population.layouts.update(layouts)
        raise UnsupportedOperationError(
            f"members evaluated in rows differ from the same members alone by {worst:.1e} (relative): this model's "
            'activations do not keep the members in their leading dimension. Use mode="vmap" or mode="loop"'
        )
    return worst


def _is_half(population: PerturbedModel) -> bool:
    return any(population.parameter(name).element_size() < 4 for name in population.names)


def _share_of_effect(call: Call, out: Any) -> float:
    """How far joint outputs are from members alone, as a part of how far those are from the center (norms)."""
    count, shares = len(call.members), []
    for p in sorted({0, count // 2, count - 1}):
        expected = call.plain(p)
        got = _scalars_of(cut(out, p, count, call.rows, call.population.batch_dim), expected, p, count)
        args, kwargs = call.own(p)
        center = call.population.model(*args, **kwargs)
        error, effect = _distance(got, expected), _distance(center, expected)
        shares.append(error / effect if effect > 0.0 else float(error > 0.0))
    return max(shares)


def _distance(x: Any, y: Any) -> float:
    pairs = zip(tree_flatten(x)[0], tree_flatten(y)[0], strict=True)
    floating = [(a.double(), b.double()) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point()]
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in floating))
