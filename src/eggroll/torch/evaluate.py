"""The ways to evaluate a population (rows, ``torch.vmap``, one member at a time), and the check of the first."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.active import PerturbedModel
from eggroll.torch.compare import largest_difference
from eggroll.torch.layout.outputs import Places, written_out
from eggroll.torch.layout.probe import FAILURES, originals_of, refuse_bypassed
from eggroll.torch.layout.rows import Inputs, count_rows, cut, member_dims
from eggroll.torch.layout.single import PLAIN_BYTES, sigma_for_checks
from eggroll.torch.layout.split import Outputs
from eggroll.torch.layout.watch import Watch
from eggroll.torch.padding import padding_as_in_plain_models
from eggroll.torch.perturbed import MemberContext, MemberTensor, PerturbedWeight, Value
from eggroll.torch.quantized.tensor import grid_of, precision
from eggroll.torch.state import StateLostError, random_numbers_kept
from eggroll.torch.unanimous import Unanimous

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
        """The inputs of the ``p``-th member alone, its own to write to.

        Raises:
            UnsupportedOperationError: they hold a cache that all members have written to.
        """
        if len(self.members) == 1:
            return self.inputs
        for leaf in tree_flatten(self.inputs)[0]:
            if hasattr(leaf, "get_seq_length") and int(leaf.get_seq_length() or 0) > 0:
                raise UnsupportedOperationError(
                    f"the inputs hold a {type(leaf).__name__} that all members have written to, which cannot be cut "
                    "into theirs: begin with an empty one, or evaluate one member with population.member"
                )
        return _copied(cut(self.inputs, p, len(self.members), self.rows, self.population.batch_dim))

    def alone(self, p: int, *, plain: bool = False) -> Any:
        """The outputs of the ``p``-th member alone, with ``plain`` tensors as its weights or with values."""
        return self.of_member(p, self.own(p), plain=plain)

    def of_member(self, p: int, inputs: Inputs, *, plain: bool) -> Any:
        """The outputs of the ``p``-th member for inputs."""
        population = self.population
        with population.member(self.generation, self.members[p], sigma=self.sigma, materialize=plain) as model:
            return model(*inputs[0], **inputs[1])

    def reference(self, p: int, inputs: Inputs | None = None) -> Any:
        """What joint outputs are compared with: the ``p``-th member with plain weights.

        Where these are large or quantized, or would round the perturbation away (16 bit), they are values, if the model
        takes these.
        """
        inputs = self.own(p) if inputs is None else inputs
        if self.population.plain_loop or not self._takes_values():
            return self.of_member(p, inputs, plain=True)
        try:
            return self.of_member(p, inputs, plain=False)
        except UnsupportedOperationError:
            return self.of_member(p, self.own(p), plain=True)

    def _takes_values(self) -> bool:
        perturbed = [self.population.parameter(name) for name in self.population.names]
        size = sum(parameter.numel() * parameter.element_size() for parameter in perturbed)
        return size > PLAIN_BYTES or _is_half(self.population) or any(grid_of(p) is not None for p in perturbed)

    def watch(self) -> None:
        """Once for each population: refuse a model that uses the parameters themselves instead of the values."""
        population = self.population
        if population.watched:
            return
        seen = Watch(MemberContext(None), originals_of(population))
        args, kwargs = _copied(self.own(0))
        with contextlib.suppress(*FAILURES), population.member(self.generation, self.members[0]) as model, seen:
            model(*args, **kwargs)
        refuse_bypassed(seen.bypassed)
        population.watched = True

    def places(self, outputs: Any) -> Places:
        """Where outputs like these hold rows: from the first member's, and its outputs for every row given twice.

        Kept, as it depends on the model alone.
        """
        own, batch_dim = self.rows // len(self.members), self.population.batch_dim
        leaves, structure = tree_flatten(outputs)
        known = self.population.places
        key = (str(structure), own == 1, tuple(x.ndim if isinstance(x, Tensor) else None for x in leaves))
        if key not in known:
            with torch.no_grad(), random_numbers_kept(self.population.device):
                one = self.reference(0)
                try:
                    twice = self.reference(0, self._twice())
                    found = Places.of(one, twice, own, 2, batch_dim)
                except Exception:  # a model that takes no other number of rows
                    found = None
            known[key] = found or Places.likely(one, own, batch_dim)
        return known[key]

    def given(self, places: Places, outputs: Any) -> Any:
        """Joint outputs as they are; where they hold rows is remembered for :meth:`Population.split`."""
        given, usual = Outputs(), self.population.batch_dim
        for x, at in zip(places.flat(outputs, self.rows), places.leaves, strict=True):
            if isinstance(x, Tensor) and x.ndim > 0 and at != min(usual, x.ndim - 1):
                given.note(x, ["own" if at is None or at == "list" else at])
        self.population.given = given
        return outputs

    def joined(self, outputs: Sequence[Any]) -> Any:
        """The outputs of all members, one after the other, as joint ones."""
        places = self.places(outputs[0])
        return self.given(places, places.join(outputs, self.rows // len(outputs)))

    def _twice(self) -> Inputs:
        """The first member's inputs with every row given twice."""
        dims = member_dims(self.inputs, self.rows, self.population.batch_dim)
        leaves, structure = tree_flatten(self.own(0))
        twice = [x if dim is None else torch.cat([x, x], dim) for x, dim in zip(leaves, dims, strict=True)]
        return tree_unflatten(twice, structure)


def _copied(tree: Any) -> Any:
    """Inputs that a model may write to."""
    leaves, structure = tree_flatten(tree)
    return tree_unflatten([x.clone() if isinstance(x, Tensor) else _copy_of(x) for x in leaves], structure)


def _copy_of(leaf: Any) -> Any:
    return copy.deepcopy(leaf) if hasattr(leaf, "get_seq_length") else leaf


def run_rows(call: Call, *, trusting: bool = False, checked: bool = False) -> Any:
    """All members in one forward, as rows of one batch.

    What holds no rows is each member's own in a ``checked`` model, and as the model gave it otherwise. The inputs stay
    as they are where a model is known to write to them.
    """
    population = call.population
    args, kwargs = _copied(call.inputs) if trusting or population.writes_inputs else call.inputs
    with population.perturbed(call.generation, call.members, sigma=call.sigma) as active:
        active.context.trusting = trusting
        outputs = population.model(*args, **kwargs)
    if active.context.single:
        return outputs
    count = len(call.members)
    if not checked:
        plain = written_out(outputs, count, call.rows)
        active.outputs.note(plain, ["own" if isinstance(x, Value) else None for x in tree_flatten(outputs)[0]])
        population.given = active.outputs
        return plain
    if population.mixes_numbers:
        raise UnsupportedOperationError(
            "the model gives one number for all rows of a batch (a mean over it, such as a loss), which is not each "
            'member\'s own. Use mode="vmap" or mode="loop"'
        )
    places = call.places(outputs)
    return call.given(places, places.spread(outputs, count, call.rows))


def run_loop(call: Call) -> Any:
    """One member after the other, as values or, where the model does not take these, with plain weights."""
    call.watch()
    population, members = call.population, range(len(call.members))
    outputs: list[Any] = []
    if not population.plain_loop:
        try:
            outputs = [call.alone(p) for p in members]
        except StateLostError:
            raise
        except Exception:  # an error of the model itself comes up again with plain weights
            outputs = []
    if not outputs:
        outputs = [call.alone(p, plain=True) for p in members]
        population.plain_loop = True
    return call.joined(outputs)


def run_vmap(call: Call) -> Any:
    """All members by ``torch.vmap``, which knows where they are in every tensor, whatever the layout."""
    call.watch()
    population, count = call.population, len(call.members)
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

    leaves, structure = tree_flatten(_copied(call.inputs))
    held = member_dims(call.inputs, call.rows, population.batch_dim)
    inputs = [x if dim is None else x.unflatten(dim, (count, -1)) for x, dim in zip(leaves, held, strict=True)]

    others: dict[int, Any] = {}  # what is no tensor among the outputs, by its place
    structures: dict[str, Any] = {}

    def one(member_parts: dict[str, tuple[Tensor, ...]], member_inputs: list[Any]) -> Any:
        own: dict[str, Tensor] = {}
        for name, pieces in member_parts.items():
            value = values[name]
            if isinstance(value, PerturbedWeight):
                own[name] = type(value)(value.base, *pieces, name=name, kind=value.kind, context=single)
            else:
                own[name] = pieces[0]
        with population.swapped(own), padding_as_in_plain_models(population.model):
            args, kwargs = tree_unflatten(member_inputs, structure)
            leaves, structures["outputs"] = tree_flatten(population.model(*args, **kwargs))
        others.update((slot, leaf) for slot, leaf in enumerate(leaves) if not isinstance(leaf, Tensor))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    state = population.keeper.state()
    try:
        with Unanimous(), random_numbers_kept(population.device):
            tensors = torch.vmap(one, in_dims=(0, held), randomness="error")(parts, inputs)
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
    return call.joined(outputs)


RUNS: dict[str, Callable[[Call], Any]] = {"rows": run_rows, "vmap": run_vmap, "loop": run_loop}


def difference(call: Call, out: Any) -> tuple[float, bool]:
    """Largest relative difference between joint outputs and some members alone, and whether it is within rounding."""
    found = []
    with torch.no_grad():
        for p in _some(call):
            expected = call.reference(p)
            got = _part_of(call, out, p, expected)
            if len(tree_flatten(got)[0]) != len(tree_flatten(expected)[0]):
                return float("inf"), False
            found.append(largest_difference(got, expected, narrowest(call.population.model)))
    return max(d for d, _ in found), all(close for _, close in found)


def narrowest(model: nn.Module) -> torch.dtype:
    """The floating dtype of a model's parameters that rounds most: some keep their norms in float32."""
    dtypes = {precision(parameter) for parameter in model.parameters() if parameter.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _is_half(population: PerturbedModel) -> bool:
    return torch.finfo(narrowest(population.model)).bits < 32


def _some(call: Call) -> list[int]:
    count = len(call.members)
    return sorted({0, count // 2, count - 1})


def _part_of(call: Call, out: Any, p: int, expected: Any) -> Any:
    """Member ``p``'s part of joint outputs, as :meth:`Places.join` makes them."""
    count = len(call.members)
    if count == 1:
        return out
    try:
        return call.places(expected).cut(out, p, count, call.rows)
    except ValueError:
        return None  # outputs of another form


def verify(call: Call) -> float:
    """Check rows against some members alone; see :meth:`eggroll.torch.Population.verify`."""
    population = call.population
    is_half = _is_half(population)
    if call.sigma is None and is_half:
        call = replace(call, sigma=sigma_for_checks(population))
    with torch.no_grad():
        layouts = dict(population.layouts)
        out = run_rows(call, trusting=True, checked=True)
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


def _share_of_effect(call: Call, out: Any) -> float:
    """How far joint outputs are from members alone, as a part of how far those are from the center (norms)."""
    shares = []
    for p in _some(call):
        expected = call.reference(p)
        got = _part_of(call, out, p, expected)
        args, kwargs = call.own(p)
        center = call.population.model(*args, **kwargs)
        error, effect = _distance(got, expected), _distance(center, expected)
        shares.append(error / effect if effect > 0.0 else float(error > 0.0))
    return max(shares)


def _distance(x: Any, y: Any) -> float:
    pairs = zip(tree_flatten(x)[0], tree_flatten(y)[0], strict=True)
    floating = [(a.double(), b.double()) for a, b in pairs if isinstance(b, Tensor) and b.is_floating_point()]
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in floating))
