"""Before a model's first call under a population: a few rows, to learn layouts from and to check against members alone.

The number of rows is one that no other dimension shares, so that sizes tell what holds the members
(:mod:`eggroll.torch.layout.rules` remembers it). Some of the members are then evaluated alone, with plain weights: a
model that moves or mixes its rows (sorts them, normalizes over the batch, compares every row with every other), that
goes on by numbers of its activations, or that reaches its parameters by other ways than their names, is refused before
it gives a wrong result. What moves rows only for some inputs may pass; ``Population.verify`` checks the inputs it is
given. The model and the global sources of random numbers are as before afterwards.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.compare import largest_difference, relative_difference
from eggroll.torch.compare import tolerance as rounding
from eggroll.torch.draws import Draws, global_state
from eggroll.torch.layout.outputs import Places
from eggroll.torch.layout.rows import Inputs, addresses, cut, fewer_rows, member_data, member_dim
from eggroll.torch.layout.rules import address, learn
from eggroll.torch.layout.single import plain_values, sigma_for_checks
from eggroll.torch.layout.split import Found, form_of
from eggroll.torch.layout.watch import Originals, Watch
from eggroll.torch.members import Members
from eggroll.torch.ops.routed import written_out
from eggroll.torch.ops.routing import Routing
from eggroll.torch.perturbed import MemberContext, MemberTensor, Value
from eggroll.torch.quantized.tensor import precision
from eggroll.torch.state import State, random_numbers_kept
from eggroll.torch.swap import place

# Whatever goes wrong with other inputs than the model is called with is no reason to refuse those.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


ALTERED_READS = 8
"""How many numbers that a model reads are tried with another value; with more, all of them count as used."""

WAYS_OUT = 'Evaluate with population.forward and mode="vmap" or mode="loop"'


class UnusedParameterWarning(UserWarning):
    """Some perturbed parameters have no influence on the model's outputs."""


def learn_and_check(
    population: Members,
    context: MemberContext,
    members: int,
    placed: Mapping[str, Tensor],
    module: nn.Module,
    inputs: Inputs,
) -> bool:
    """Learn the layouts of a module's activations from a small call, and check it against members alone.

    Args:
        population: the members, of which some are tried.
        context: of the block that the call is made in.
        members: of that block.
        placed: the values that are in the place of parameters now, and again afterwards.
        module: what is called.
        inputs: of the call.

    Returns:
        Whether a small call was possible.

    Raises:
        UnsupportedOperationError: rows do not hold the members of this model.
    """
    refusal, has_run, picked = _refusal(population, context, members, placed, module, inputs)
    if picked and not population.picks:
        # A mixture of experts, perhaps: once more, with rows that know their members wherever they are put. Also where
        # nothing was wrong, as other inputs will have rows picked by other experts.
        learned, found = dict(population.layouts), dict(population.found)
        population.picks = context.picks = True
        again, runs, _ = _refusal(population, context, members, placed, module, inputs)
        if again is None and runs:
            refusal, has_run = None, True
        else:
            population.picks = context.picks = False
            population.layouts.clear()
            population.layouts.update(learned)
            population.found = found
    if refusal is not None:
        raise refusal
    return has_run


def _refusal(
    population: Members,
    context: MemberContext,
    members: int,
    placed: Mapping[str, Tensor],
    module: nn.Module,
    inputs: Inputs,
) -> tuple[UnsupportedOperationError | None, bool, bool]:
    """Why small calls refuse the model, whether one could run, and whether it picks rows by their numbers."""
    own_rows = (context.rows or 0) // members
    known, tried = dict(population.layouts), list[int]()
    refusal: UnsupportedOperationError | None = None
    has_run = picked = False
    while len(tried) < TRIES:
        # A size that the model makes of others (a pooled length) may have been the number of rows by chance.
        population.layouts.clear()
        population.layouts.update(known)
        before, has_run = tuple(tried), False
        for own in (1, 2)[:own_rows]:  # a layer that takes no batch of one may take two
            probe = _Probe.of(population, context, placed, module, inputs, own, before)
            if probe is None:
                break
            tried.append(probe.count)
            try:
                with contextlib.suppress(_CannotRun), torch.no_grad(), random_numbers_kept(population.device):
                    refusal = probe.refusal()
                    has_run = True
                    break
            finally:
                picked |= probe.watch is not None and probe.watch.picked
                probe.state.restore()
                place(population.sites, placed)
        if refusal is None or not has_run:
            break
    return refusal, has_run, picked


def refuse_bypassed(names: set[str]) -> None:
    """Refuse a model that uses its own references to perturbed parameters.

    Raises:
        UnsupportedOperationError: there are such names.
    """
    if names:
        raise UnsupportedOperationError(
            f"the model uses {_listed(sorted(names))} by a reference of its own (kept in a list, as a view, or in one "
            "flat tensor, as FSDP does), so that members' values cannot take its place and all members would be the "
            "same there. Let the forward read the parameter from its module, or leave it alone (exclude=[...])"
        )


def originals_of(population: Members) -> Originals:
    """What finds the perturbed parameters themselves among the tensors that a model works with."""
    return Originals({spec.name: population.parameter(spec.name) for spec in population.specs})


TRIES = 3
"""Small calls, of different numbers of rows, after which a model is refused."""


class _CannotRun(Exception):
    """The module does not take these inputs."""


@dataclass
class _Probe:
    """A call of a module with ``count`` members of ``own`` rows each."""

    population: Members
    context: MemberContext
    placed: Mapping[str, Tensor]
    module: nn.Module
    inputs: Inputs
    count: int
    own: int
    sigma: float
    state: State
    draws: bool = False
    watch: Watch | None = field(default=None, repr=False)
    found: set[Found | None] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        population: Members,
        context: MemberContext,
        placed: Mapping[str, Tensor],
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
        state = population.keeper.state(thorough=True, hooks=True)
        return cls(population, context, placed, module, fewer[1], fewer[0], own, sigma, state)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.count * self.own

    @property
    def held(self) -> int:
        """How many members are tried."""
        return min(self.count, self.population.population_size)

    def member(self, p: int) -> int:
        """Which member the ``p``-th place of the call is: all of them, in an order that is no palindrome."""
        return p % self.held or int(p == self.count - 1)

    def refusal(self) -> UnsupportedOperationError | None:
        """Why rows do not hold the members of this model, if they do not."""
        try:
            self.check()
        except UnsupportedOperationError as error:
            return error
        return None

    def check(self) -> None:
        """Run all, then some alone.

        Raises:
            UnsupportedOperationError: they differ, or the model cannot be compared.
        """
        before = global_state(self.population.device)
        together = self._together()
        after = global_state(self.population.device)
        if before[1:] != after[1:]:
            raise UnsupportedOperationError(
                "the model draws from Python's or NumPy's global random numbers, the same for all rows of a batch, so "
                'that members would not have their own. Evaluate with population.forward and mode="loop"'
            )
        if not torch.equal(before[0], after[0]):
            self.draws = True
            together = self._together()
        self.population.draws = self.draws
        self._check_parameters()
        places = sorted({0, 1, self.count // 2, self.count - 1})
        shares = [share for p in places for share in self._shares(p, together)]
        if shares:
            share = max(shares)
            size = f"{share:.0%} of" if share < math.inf else "more than"
            raise UnsupportedOperationError(
                f"members evaluated together differ from the same members alone, by {size} what their perturbation "
                "does: this model moves or mixes the rows of a batch (sorting or regrouping them, statistics over the "
                "batch, concatenation in the batch dimension), or its activations do not hold the members in their "
                f"leading dimension. {WAYS_OUT}"
            )
        self._check_reads(places, together)

    def _together(self, alter: int | None = None) -> Any:
        """The outputs of all members as rows; ``watch`` is what was seen then."""
        population, held = self.population, range(self.held)
        context = replace(self.context, members=len(held), rows=self.rows, layouts={}, trusting=True)
        index = torch.tensor([self.member(p) for p in range(self.count)], device=population.device)
        values = population.values(0, held, context, sigma=self.sigma)
        context.members = self.count
        chosen = {name: value.chosen(index) for name, value in values.items()}  # type: ignore[attr-defined]
        watch = Watch(context, originals_of(population), alter=alter)
        routing = Routing(context) if context.picks else None
        try:
            outputs = written_out(self._call(chosen, self.inputs, context, index.tolist(), watch, routing))
            watch.used |= {leaf.parameter for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Value)}
            return outputs
        finally:
            kept = replace(context, layouts=population.layouts)
            for use, layout in context.layouts.items():
                learn(kept, use, layout)
            if alter is None:
                self.watch = watch

    def _alone(self, p: int, member: int, watch: Watch | None = None) -> Any:
        """The outputs of one member, as plain weights, for the inputs of the ``p``-th place."""
        population, context = self.population, MemberContext(None)
        values = population.values(0, range(member, member + 1), context, sigma=self.sigma)
        inputs = cut(self.inputs, p, self.count, self.rows, population.batch_dim)
        try:
            return self._call(plain_values(population, values), inputs, context, [member], watch)
        finally:
            place(population.sites, self.placed)  # so that one copy of the weights is alive at a time

    def _call(
        self,
        values: Mapping[str, Tensor],
        inputs: Inputs,
        context: MemberContext,
        members: list[int],
        watch: Watch | None,
        routing: Routing | None = None,
    ) -> Any:
        """The module's outputs for values, from the state that it is in before the call, on copies of inputs."""
        self.state.restore()
        place(self.population.sites, values)

        def copied(x: Any) -> Any:
            if hasattr(x, "get_seq_length"):
                return copy.deepcopy(x)  # an empty cache, which the call writes to
            return x.clone() if isinstance(x, Tensor) and address(x) not in self.context.constants else x

        args, kwargs = tree_map(copied, inputs)
        context.inputs = addresses(tree_flatten((args, kwargs))[0])
        draws = Draws(self.population.noise.seed, 0, lambda: members, context)
        clones = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        versions = [x._version for x in clones]
        try:
            nothing = contextlib.nullcontext()
            with draws if self.draws else nothing, routing or nothing, watch or nothing:
                return self.module(*args, **kwargs)
        except FAILURES as error:
            raise _CannotRun from error
        finally:
            self.population.writes_inputs |= versions != [x._version for x in clones]

    def _check_parameters(self) -> None:
        """Whether the model got the members' values, and not the parameters themselves."""
        watch, sites = self.watch, self.population.sites
        assert watch is not None
        refuse_bypassed(watch.bypassed)
        self.population.used |= watch.used  # a part that is called by itself, as a body before the head
        if self.module is not self.population.model:
            return
        names = [spec.name for spec in self.population.specs]
        unused = [name for name in names if name not in self.population.used]
        if not unused or self.population.told_unused:
            return
        self.population.told_unused = True
        if self.population.used:
            # Parts that are not called (an expert that was not chosen, a pooler) have parameters without a use.
            called = self._called({site.module for name in unused for site in sites[name]})
            unused = [name for name in unused if any(site.module in called for site in sites[name])]
        if unused:
            warnings.warn(
                f"{len(unused)} of {len(names)} perturbed parameters ({_listed(unused)}) are not used by the model's "
                "forward, so that perturbing them changes nothing. If it works with copies of them, or with values "
                "that it made from them earlier, make the population before such copies, and empty the model's caches "
                "(many are emptied by model.train() and model.eval()); otherwise leave these parameters alone "
                "(exclude=[...])",
                UnusedParameterWarning,
                stacklevel=2,
            )

    def _called(self, modules: set[nn.Module]) -> set[nn.Module]:
        """Which of some modules run when the model does."""
        called: set[nn.Module] = set()
        handles = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in modules]
        try:
            self._alone(0, 0)
        finally:
            for handle in handles:
                handle.remove()
        return called

    def _shares(self, p: int, together: Any) -> list[float]:
        """The outputs of one member that differ from it alone by more than rounding, and by how much."""
        outputs = self._alone(p, self.member(p))
        self._find_rows(outputs, together)
        joint, mine = tree_flatten(together)[0], tree_flatten(outputs)[0]
        if len(joint) != len(mine):
            places = Places.of(outputs, together, self.own, self.count, self.population.batch_dim)
            if places is None:
                return [math.inf]
            # The entries of a list that has one for each row are the member's own.
            joint = tree_flatten(places.own_entries(together, p, self.count, self.rows))[0]
        only_indices = not any(isinstance(x, Tensor) and x.is_floating_point() for x in mine)
        found = []
        for position, (all_rows, own) in enumerate(zip(joint, mine, strict=True)):
            if not isinstance(own, Tensor) or own.is_sparse or own.is_nested or own.numel() == 0:
                continue
            got = self._part(all_rows, own, p)
            if got is None:
                raise self._no_rows(all_rows, own)
            if not own.is_floating_point():
                found += [math.inf] if only_indices and float((got != own).float().mean()) > 0.1 else []
                continue
            precision = self._precision(own)
            if relative_difference(got, own) <= rounding(precision):
                continue
            if got is all_rows and own.numel() == 1:
                # One number for the whole batch (a loss): in a block nobody takes it for that of a member.
                self.population.mixes_numbers = True
                continue
            other = tree_flatten(self._alone(p, (self.member(p) + 1) % self.held))[0][position]
            effect = float((other.double() - own.double()).norm()) if other.shape == own.shape else 0.0
            share = float((got.double() - own.double()).norm()) / effect if effect > 0.0 else math.inf
            if share > ALLOWED_SHARE.get(precision, 0.5):
                found.append(share)
        return found

    def _find_rows(self, outputs: Any, together: Any) -> None:
        """Remember where the outputs hold rows, for those who split them, if that is the same for all members."""
        self.found.add(Found.of(outputs, together, self.count, self.population.batch_dim))
        found, known, form = next(iter(self.found)), self.population.found, form_of(self.module, together)
        if found is not None and len(self.found) == 1:
            known[form] = found
        else:
            known.pop(form, None)

    def _part(self, all_rows: Any, own: Tensor, p: int) -> Tensor | None:
        """The part of an output that is the ``p``-th member's, in the shape of its own; ``None`` if there is none."""
        if isinstance(all_rows, MemberTensor):
            got = member_data(all_rows, self.count, self.rows)[p]
            return got if got.shape == own.shape else None
        if isinstance(all_rows, Value) or not isinstance(all_rows, Tensor):
            return None
        if all_rows.shape == own.shape:
            return all_rows  # shared by all members, or a statistic of them all
        if all_rows.ndim == own.ndim:
            differing = [d for d in range(own.ndim) if all_rows.shape[d] != own.shape[d]]
            if len(differing) == 1 and all_rows.shape[differing[0]] == self.count * own.shape[differing[0]]:
                return all_rows.chunk(self.count, differing[0])[p]
        if member_dim(all_rows, self.rows, self.population.batch_dim) is None:
            return None
        got = cut(all_rows, p, self.count, self.rows, self.population.batch_dim)
        return got.reshape(own.shape) if got.numel() == own.numel() else None  # a batch of one, squeezed

    def _no_rows(self, all_rows: Any, own: Tensor) -> UnsupportedOperationError:
        shape = tuple(all_rows.shape) if isinstance(all_rows, Tensor) else type(all_rows).__name__
        return UnsupportedOperationError(
            f"an output of shape {shape} for {self.rows} rows, which is {tuple(own.shape)} for {self.own} of one "
            "member alone, does not hold the members row by row (every row is compared with every other, or rows are "
            f"chosen by their numbers). {WAYS_OUT}"
        )

    def _check_reads(self, places: list[int], together: Any) -> None:
        """Whether numbers that the model read off its activations are each member's own, or of no consequence."""
        assert self.watch is not None
        reads = self.watch.reads
        suspects = set()
        for p in places if reads else ():
            watch = Watch(MemberContext(None), Originals({}))
            self._alone(p, self.member(p), watch)
            for index, read in enumerate(reads):
                if len(watch.reads) != len(reads) or not _agree(read.margin, watch.reads[index].margin):
                    suspects.add(index)
        for index in sorted(suspects):
            try:
                is_used = len(suspects) > ALTERED_READS or not _equal(self._together(alter=index), together)
            except _CannotRun:
                continue  # the check of an input, which raises where it does not hold
            if is_used:
                raise UnsupportedOperationError(
                    f"the model reads a number off its activations (by {reads[index].function}) and goes on by it: "
                    "evaluated together, all members would go on by the same one, which is none of theirs. Evaluate "
                    'with population.forward and mode="loop"'
                )

    def _precision(self, x: Tensor) -> torch.dtype:
        """The dtype whose rounding an output has seen: the narrowest of its own and the parameters'."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        dtypes = {x.dtype, *(precision(self.population.parameter(spec.name)) for spec in self.population.specs)}
        return min((dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: -torch.finfo(dtype).eps)


ALLOWED_SHARE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Rounding is amplified from layer to layer; a wrong layout is off by the whole effect of a perturbation."""


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (" and others" if len(names) > 3 else "")


def _agree(x: Any, y: Any) -> bool:
    """Whether two reads are of the same numbers; never for truth values of many, which hide how far off they are."""
    if x is None or y is None:
        return False
    x, y = np.asarray(x), np.asarray(y)
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True))


def _equal(x: Any, y: Any) -> bool:
    """Whether two joint outputs are the same up to rounding."""
    plain = [tree_map(lambda v: v.by_member().data_P if isinstance(v, Value) else v, tree) for tree in (x, y)]
    if len(tree_flatten(plain[0])[0]) != len(tree_flatten(plain[1])[0]):
        return False
    return largest_difference(*plain)[1]
