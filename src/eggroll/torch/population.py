"""A population of any module: the unmodified model evaluates all members in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import eggroll.torch.ops  # noqa: F401  (installs the rules)
from eggroll.core.address import member_of
from eggroll.core.select import ParameterSpec, select
from eggroll.errors import ConfigError, RewardError, UnsupportedOperationError
from eggroll.torch.evaluate import RUNS, Call, run_auto, verify
from eggroll.torch.layout.probe import learn_and_check
from eggroll.torch.layout.rows import Inputs, constants_of, member_data, rows_from_input
from eggroll.torch.noise import CACHE_BYTES, Noise
from eggroll.torch.ops.shared import SharedRows
from eggroll.torch.parameters import (
    Site,
    batch_statistics,
    parameter_sites,
    parameter_specs,
    place,
    swapped,
    training_hazards,
)
from eggroll.torch.perturbed import Layout, MemberContext, MemberTensor, PerturbedWeight, Use

Mode = Literal["auto", "rows", "vmap", "loop"]


class Population:
    """``population_size`` members around a model's parameters, evaluated together (EGGROLL section 4).

    Member ``p`` is the model with ``W + sigma * E_p`` for every selected parameter: ``E_p = A_p B_p^T / sqrt(rank)``
    for matrices, dense N(0, 1) for everything else. The model is used as it is::

        population = Population(model, population_size=64, sigma=0.02, rank=1)
        with population.perturbed(generation=0) as active, torch.no_grad():
            y = model(active.expand(x))                 # (64 * batch, ...), member by member
        fitness = active.split(y).mean(dim=(1, 2))      # (64,)

    Args:
        model: any module, in evaluation mode.
        population_size: members; both signs of an antithetic pair count.
        sigma: standard deviation of a perturbation's entries (``perturbed`` can override it).
        rank: rank of the matrices' perturbations.
        seed: seed of the noise.
        antithetic: members ``2k`` and ``2k + 1`` share a draw with opposite signs.
        noise_reuse: generations that share the same noise.
        target_modules: name patterns of the parameters to perturb; ``None`` takes all of ``kinds``.
        exclude: name patterns of parameters to leave alone.
        kinds: kinds of parameters taken when ``target_modules`` is ``None`` (see :mod:`eggroll.core.select`).
        mode: how :meth:`forward` evaluates: all members as ``rows`` of one batch, by ``torch.vmap``, one after the
            other (``loop``), or the first of these that works (``auto``).
        batch_dim: the dimension of inputs and outputs that holds the batch: 0, or 1 for time-major models.
        cache_bytes: a generation's draws are kept for its update if they need at most this much memory.

    Raises:
        ConfigError: settings that cannot work.
        SelectionError: a pattern matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        population_size: int = 256,
        sigma: float = 0.01,
        rank: int = 1,
        seed: int = 42,
        antithetic: bool = True,
        noise_reuse: int = 1,
        target_modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        kinds: Sequence[str] = ("matrix", "embedding", "conv", "experts", "vector", "other"),
        mode: Mode = "auto",
        batch_dim: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if antithetic and population_size % 2:
            raise ConfigError(
                f"population_size (={population_size}) must be even when antithetic=True; use {population_size + 1} "
                "or antithetic=False"
            )
        self.model = model
        self.population_size = population_size
        self.sigma = sigma
        self.antithetic = antithetic
        exclude = [exclude] if isinstance(exclude, str) else exclude
        target_modules = [target_modules] if isinstance(target_modules, str) else target_modules
        if mode not in get_args(Mode):
            raise ConfigError(f"mode (={mode!r}) must be one of: {', '.join(get_args(Mode))}")
        if batch_dim not in (0, 1):
            raise ConfigError(f"batch_dim (={batch_dim!r}) must be 0, or 1 for time-major inputs")
        self.mode = mode
        self.batch_dim = batch_dim
        self.sites = parameter_sites(model)
        self.specs: list[ParameterSpec] = select(
            parameter_specs(model), include=target_modules, exclude=exclude, kinds=kinds
        )
        fixed = [spec.name for spec in self.specs if not self.sites[spec.name]]
        if fixed:
            raise UnsupportedOperationError(
                f"{', '.join(fixed[:3])}{' and others' if len(fixed) > 3 else ''} belong to a TorchScript module, "
                "whose parameters cannot be replaced. Use the module that it was made from, or leave them alone "
                f"(exclude={fixed[:3]})"
            )
        self.noise = Noise(self.specs, rank, seed, noise_reuse, cache_bytes)
        self.layouts: dict[Use, Layout] = {}
        self._learned: set[int] = set()
        self._active = False
        self._fall_back = False

    @property
    def num_pairs(self) -> int:
        """Draws per generation: half the members with antithetic pairs, all of them otherwise."""
        return self.population_size // 2 if self.antithetic else self.population_size

    @property
    def device(self) -> torch.device:
        """Where the perturbed parameters are."""
        return self.parameter(self.specs[0].name).device

    def parameter(self, name: str) -> nn.Parameter:
        """The centre of a parameter, also while it is swapped."""
        return self.sites[name][0].parameter

    def values(
        self, generation: int, members: Sequence[int], context: MemberContext, *, sigma: float
    ) -> dict[str, Tensor]:
        """What stands in the place of each selected parameter for the given members."""
        device = self.device
        first, last = (member_of(member, antithetic=self.antithetic).pair for member in (members[0], members[-1]))
        draws = self.noise.draw(generation, range(first, last + 1), device)
        # Consecutive members, as member_of says: which draw each has, and with which sign.
        index = torch.arange(members[0], members[-1] + 1, device=device)
        signs = 1.0 - 2.0 * (index % 2) if self.antithetic else torch.ones(len(members), device=device)
        index = (index // 2 if self.antithetic else index) - first
        return {spec.name: self._value(spec, draws[spec.name], index, signs, sigma, context) for spec in self.specs}

    def _value(
        self, spec: ParameterSpec, draws: Tensor, index: Tensor, signs: Tensor, sigma: float, context: MemberContext
    ) -> Tensor:
        center = self.parameter(spec.name).detach()
        if spec.low_rank:
            # The rank before the long dimension in memory: see PerturbedWeight.
            a, b = (factor.transpose(-1, -2) for factor in self.noise.factors(spec, draws))
            scale = (signs * (sigma / self.noise.rank**0.5)).view(-1, *([1] * (a.ndim - 1)))
            a = (a.index_select(0, index) * scale).to(center.dtype).contiguous().transpose(-1, -2)
            b = b.to(center.dtype).index_select(0, index).contiguous().transpose(-1, -2)
            if context.single:
                a, b = a[0], b[0]
            return PerturbedWeight(center, a, b, name=spec.name, kind=spec.kind, context=context)
        noise = draws.view(-1, *spec.shape)[index] * (signs * sigma).view(-1, *([1] * len(spec.shape)))
        data = (center.to(torch.promote_types(center.dtype, torch.float32)) + noise).to(center.dtype)
        return data[0] if context.single else MemberTensor(data, name=spec.name, context=context)

    @contextmanager
    def perturbed(
        self,
        generation: int,
        members: Sequence[int] | None = None,
        *,
        sigma: float | None = None,
        rows_per_member: int | None = None,
    ) -> Iterator[Active]:
        """Inside the block, the model is the population of ``members`` (consecutive; all by default).

        Inputs carry the members in their batch dimension, ``(len(members) * batch, ...)``, member by member
        (:meth:`Active.expand` makes them so), and so do outputs, ``model.generate()`` included. ``rows_per_member``
        states the batch where it cannot be read off the model's first input.

        Raises:
            ConfigError: members that do not exist, or inputs that do not have rows for each of them.
            UnsupportedOperationError: the model is in training mode with dropout or batch normalisation, an
                operation has no rule and no exact fall-back, or the model mixes its rows (checked before its first
                call with a few members alone). The model is as before in every case.
        """
        chosen = range(self.population_size) if members is None else members
        self.check(chosen)
        sigma = self.sigma if sigma is None else sigma
        count = None if len(chosen) == 1 else len(chosen)
        rows = None if count is None or rows_per_member is None else count * rows_per_member
        context = self.context(count, rows)
        values = self.values(generation, chosen, context, sigma=sigma)
        with self.standing_in(values, context, len(chosen)) as active:
            active.first = chosen[0]
            yield active

    def context(self, members: int | None, rows: int | None = None) -> MemberContext:
        """What the values of one forward share; ``members`` is ``None`` for a single one."""
        if members is None:
            return MemberContext(None)
        return MemberContext(members, rows, self.layouts, batch_dim=self.batch_dim, constants=constants_of(self.model))

    @contextmanager
    def standing_in(self, values: dict[str, Tensor], context: MemberContext, members: int) -> Iterator[Active]:
        """Inside the block, ``values`` (of :meth:`values`, or made elsewhere) stand in the place of parameters."""
        active = Active(self, values, context, members)
        with self.swapped(values, single=context.single):
            if context.single:
                yield active
                return
            with rows_from_input(self.model, context, partial(self._learn, active)):
                yield active

    @contextmanager
    def member(self, generation: int, index: int, *, sigma: float | None = None) -> Iterator[nn.Module]:
        """Inside the block, the model is one member; inputs and outputs are its plain ones."""
        with self.perturbed(generation, range(index, index + 1), sigma=sigma):
            yield self.model

    def _learn(self, active: Active, module: nn.Module, inputs: Inputs) -> None:
        """Before a module's first call: where each parameter meets the members, and whether rows hold them at all."""
        if id(module) not in self._learned and active.context.rows:
            learn_and_check(self, active, module, inputs)
            self._learned.add(id(module))

    @contextmanager
    def swapped(self, values: dict[str, Tensor], *, single: bool) -> Iterator[None]:
        """Put values in the place of the model's parameters for the length of the block."""
        self._active = True
        try:
            with _batched_experts(self.model), swapped(self.model, self.sites, values, single=single):
                yield
        finally:
            self._active = False

    def check(self, members: Sequence[int]) -> None:
        """Refuse what cannot be evaluated: members that do not exist, a model that draws noise of its own."""
        if self._active:
            raise UnsupportedOperationError("the population is already active; leave the first block before the next")
        if len(members) == 0 or min(members) < 0 or max(members) >= self.population_size:
            raise ConfigError(
                f"members {members} must be within 0 to {self.population_size - 1} (population_size) and not empty"
            )
        if list(members) != list(range(members[0], members[0] + len(members))):
            raise ConfigError(f"members {list(members)} must be consecutive")
        self.refuse_hazards(len(members))

    def refuse_hazards(self, members: int) -> None:
        """Refuse a model that draws noise of its own, or mixes ``members`` of it.

        Raises:
            UnsupportedOperationError: dropout or batch statistics in training mode.
        """
        hazards = training_hazards(self.model)
        if hazards:
            raise UnsupportedOperationError(
                f"the model is in training mode with {', '.join(hazards[:3])}"
                f"{' and others' if len(hazards) > 3 else ''}: members would differ by more than their perturbation. "
                "Call model.eval() first"
            )
        mixing = batch_statistics(self.model) if members > 1 else []
        if mixing:
            raise UnsupportedOperationError(
                f"{', '.join(mixing[:3])}{' and others' if len(mixing) > 3 else ''} keeps no running statistics and "
                'normalises over all members together. Evaluate one member at a time (mode="loop")'
            )

    @torch.no_grad()
    def scores(
        self,
        fitness_fn: Callable[[Active], Tensor],
        generation: int,
        *,
        sigma: float | None = None,
        members_per_forward: int | None = None,
        members: range | None = None,
    ) -> Tensor:
        """Fitness of members (all by default): ``fitness_fn`` is called while the model is (some of) them.

            >>> def fitness(active):
            ...     logits = active.split(model(active.expand(x)))  # (members, batch, classes)
            ...     return (logits.argmax(-1) == labels).float().mean(1)
            >>> population.scores(fitness, generation=0, members_per_forward=128)

        Args:
            fitness_fn: gets the :class:`Active` population, returns one score for each of its ``members``.
            generation: whose noise it is; the draws are kept for the update if they are small.
            sigma: instead of the population's own.
            members_per_forward: how many members are evaluated at once; all by default. A number whose activations
                stay in cache is the fastest. Results do not depend on it.
            members: consecutive members.

        Returns:
            ``(len(members),)`` scores.

        Raises:
            RewardError: another number of scores.
        """
        everyone = range(self.population_size) if members is None else members
        step = members_per_forward or len(everyone)
        self.noise.prepare(generation, self.num_pairs, self.device)
        # One tensor for all scores: small ones that outlive each part would split the memory that the next part needs.
        found: Tensor | None = None
        for first in range(everyone.start, everyone.stop, step):
            part = range(first, min(first + step, everyone.stop))
            with self.perturbed(generation, part, sigma=sigma) as active:
                scores = fitness_fn(active)
            if not isinstance(scores, Tensor) or scores.shape != (len(part),):
                given = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
                raise RewardError(
                    f"fitness_fn must return a tensor ({len(part)},), one score for each member; got {given}"
                )
            if found is None:
                found = scores.new_empty(len(everyone))
            found[first - everyone.start : part.stop - everyone.start] = scores
        assert found is not None
        return found

    def forward(
        self,
        *args: Any,
        generation: int,
        members: Sequence[int] | None = None,
        sigma: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's outputs for inputs that carry the members in their batch dimension, in the population's ``mode``.

        ``mode="auto"`` tries rows, checked against single members on the first call, then ``vmap``, then the loop,
        and keeps to the first that works (``population.mode`` says which it is then). Inputs of another size than the
        first one's (a mask, positions) are the same for all members. A scalar output becomes one for each member.
        """
        chosen = range(self.population_size) if members is None else members
        call = Call(self, (args, kwargs), generation, chosen, sigma)
        if self.mode == "auto":
            chosen_mode, outputs = run_auto(call)
            self.mode, self._fall_back = chosen_mode, True  # type: ignore[assignment]
            return outputs
        try:
            return RUNS[self.mode](call)
        except UnsupportedOperationError:
            if not self._fall_back or self.mode == "loop":
                raise
            return RUNS["loop"](call)

    def verify(
        self,
        *args: Any,
        generation: int = 0,
        members: Sequence[int] | None = None,
        sigma: float | None = None,
        **kwargs: Any,
    ) -> float:
        """Largest relative difference between the population forward and single members.

        The first, middle and last of ``members`` are evaluated alone.

        Raises:
            UnsupportedOperationError: they differ beyond rounding, so rows do not hold the members of this model.
        """
        chosen = range(self.population_size) if members is None else members
        return verify(Call(self, (args, kwargs), generation, chosen, sigma))


class Active:
    """A population while it stands in the place of the model's parameters.

    Attributes:
        members: how many members there are.
        first: the first of them; the others follow it.
    """

    def __init__(self, population: Population, values: dict[str, Tensor], context: MemberContext, members: int) -> None:
        self.population, self.context, self.members, self.first = population, context, members, 0
        self.values = self.placed = values

    def expand(self, x: Tensor) -> Tensor:
        """One batch for every member: ``(batch, ...)`` to ``(members * batch, ...)``, member by member.

        Numbers are not copied before a layer needs the copies: the model's first product is made once for all members.
        """
        dim = self._batch_dim(x)
        if self.context.single:
            return x
        if dim == 0 and x.ndim > 1 and x.is_floating_point() and not x.requires_grad and len(x) > 0:
            return SharedRows(x, self.context)
        return x.repeat(*([1] * dim), self.members, *([1] * (x.ndim - dim - 1)))

    def split(self, y: Tensor) -> Tensor:
        """``(members * batch, ...)`` to ``(members, batch, ...)``.

        Raises:
            UnsupportedOperationError: the output does not hold the members.
        """
        if isinstance(y, SharedRows):
            y = y.written_out()
        if isinstance(y, PerturbedWeight):
            y = MemberTensor(y.dense(), name=y.parameter, context=y.context)
        if isinstance(y, MemberTensor):
            return member_data(y, self.members, self.context.rows or 0)
        dim = self._batch_dim(y)
        if y.ndim == 0 or y.shape[dim] % self.members:
            raise UnsupportedOperationError(
                f"an output of shape {tuple(y.shape)} does not hold {self.members} members: the model mixes its rows. "
                'Use mode="vmap" or mode="loop"'
            )
        return y.unflatten(dim, (self.members, -1)).movedim(dim, 0)

    def _batch_dim(self, x: Tensor) -> int:
        return min(self.population.batch_dim, max(x.ndim - 1, 0))

    def select_rows(self, member_of_row: Tensor) -> None:
        """From now on, row ``i`` of activations belongs to member ``member_of_row[i]`` (a subset, any order).

        Used while generating, to stop computing rows that have finished.
        """
        if self.context.single:
            return  # all rows are the one member's, whichever are left
        self.placed = {name: value.chosen(member_of_row) for name, value in self.values.items()}  # type: ignore[attr-defined]
        self.context.members = self.context.rows = len(member_of_row)
        place(self.population.sites, self.placed)


@contextmanager
def _batched_experts(model: nn.Module) -> Iterator[None]:
    """Hugging Face mixtures regroup tokens by expert unless asked for their batched form, which keeps the rows."""
    change: Callable[[str], None] | None = getattr(model, "set_experts_implementation", None)
    previous = getattr(getattr(model, "config", None), "_experts_implementation", None)
    if change is None or previous in (None, "batched_mm") or not _has_experts(model):
        yield
        return
    change("batched_mm")
    try:
        yield
    finally:
        change(previous)


def _has_experts(model: nn.Module) -> bool:
    return any(spec.kind == "experts" for spec in parameter_specs(model))


__all__ = ["Active", "Mode", "Population", "Site"]
