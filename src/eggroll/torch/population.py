"""A population of any module: the unmodified model evaluates all members in one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

import eggroll.torch.ops  # noqa: F401  (installs the rules)
from eggroll.core.address import member_of
from eggroll.core.select import ParameterSpec, select
from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch.noise import CACHE_BYTES, Noise
from eggroll.torch.parameters import (
    Site,
    parameter_sites,
    parameter_specs,
    place,
    swapped,
    training_hazards,
)
from eggroll.torch.values import Layout, MemberContext, MemberTensor, PerturbedWeight, Value

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
        self.mode = mode
        self.sites = parameter_sites(model)
        self.specs: list[ParameterSpec] = select(
            parameter_specs(model), include=target_modules, exclude=exclude, kinds=kinds
        )
        self.noise = Noise(self.specs, rank, seed, noise_reuse, cache_bytes)
        self._layouts: dict[str, Layout] = {}
        self._active = False

    @property
    def num_pairs(self) -> int:
        """Draws per generation: half the members with antithetic pairs, all of them otherwise."""
        return self.population_size // 2 if self.antithetic else self.population_size

    def parameter(self, name: str) -> nn.Parameter:
        """The centre of a parameter, also while it is swapped."""
        return self.sites[name][0].parameter

    def values(
        self, generation: int, members: Sequence[int], context: MemberContext, *, sigma: float
    ) -> dict[str, Tensor]:
        """What stands in the place of each selected parameter for the given members."""
        device = self.parameter(self.specs[0].name).device
        which = [member_of(member, antithetic=self.antithetic) for member in members]
        pairs = range(which[0].pair, which[-1].pair + 1) if which else range(0)
        draws = self.noise.draw(generation, pairs, device)
        index = torch.tensor([member.pair - pairs.start for member in which], device=device)
        signs = torch.tensor([float(member.sign) for member in which], device=device)
        return {spec.name: self._value(spec, draws[spec.name], index, signs, sigma, context) for spec in self.specs}

    def _value(
        self, spec: ParameterSpec, draws: Tensor, index: Tensor, signs: Tensor, sigma: float, context: MemberContext
    ) -> Tensor:
        center = self.parameter(spec.name).detach()
        if spec.low_rank:
            a, b = self.noise.factors(spec, draws)
            scale = (signs * (sigma / self.noise.rank**0.5)).view(-1, *([1] * (a.ndim - 1)))
            a = (a[index] * scale).to(center.dtype)
            b = b.to(center.dtype)[index]
            if context.single:
                a, b = a[0], b[0]
            return PerturbedWeight(center, a, b, name=spec.name, kind=spec.kind, context=context)
        noise = draws.view(-1, *spec.shape)[index] * (signs * sigma).view(-1, *([1] * len(spec.shape)))
        data = (center.float() + noise).to(center.dtype)
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

        Inputs carry the members in their leading dimension, ``(len(members) * batch, ...)``, member by member
        (:meth:`Active.expand` makes them so), and so do outputs, ``model.generate()`` included. ``rows_per_member``
        states the batch where it cannot be read off the model's first input (time-major inputs).

        Raises:
            UnsupportedOperationError: the model is in training mode with dropout or batch normalisation, or an
                operation has no rule and no exact fall-back. The model is as before in every case.
        """
        chosen = range(self.population_size) if members is None else members
        self._check(chosen)
        rows = None if rows_per_member is None else len(chosen) * rows_per_member
        context = MemberContext(len(chosen), rows, self._layouts)
        values = self.values(generation, chosen, context, sigma=self.sigma if sigma is None else sigma)
        with self._swapped(values), _rows_from_input(self.model, context, fixed=rows is not None):
            yield Active(self, values, context, len(chosen))

    @contextmanager
    def member(self, generation: int, index: int, *, sigma: float | None = None) -> Iterator[nn.Module]:
        """Inside the block, the model is one member; inputs and outputs are its plain ones."""
        self._check(range(index, index + 1))
        context = MemberContext(None)
        values = self.values(generation, range(index, index + 1), context, sigma=self.sigma if sigma is None else sigma)
        with self._swapped(values):
            yield self.model

    @contextmanager
    def _swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        self._active = True
        try:
            with _batched_experts(self.model), swapped(self.sites, values):
                yield
        finally:
            self._active = False

    def _check(self, members: Sequence[int]) -> None:
        if self._active:
            raise UnsupportedOperationError("the population is already active; leave the first block before the next")
        if len(members) == 0 or min(members) < 0 or max(members) >= self.population_size:
            raise ConfigError(
                f"members {members} must be within 0 to {self.population_size - 1} (population_size) and not empty"
            )
        if list(members) != list(range(members[0], members[0] + len(members))):
            raise ConfigError(f"members {list(members)} must be consecutive")
        hazards = training_hazards(self.model)
        if hazards:
            raise UnsupportedOperationError(
                f"the model is in training mode with {', '.join(hazards[:3])}"
                f"{' and others' if len(hazards) > 3 else ''}: members would differ by more than their perturbation. "
                "Call model.eval() first"
            )

    def forward(
        self,
        *args: Any,
        generation: int,
        members: Sequence[int] | None = None,
        sigma: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's outputs for inputs whose tensors carry the members in front, in the population's ``mode``.

        ``mode="auto"`` tries rows, checked against single members on the first call, then ``vmap``, then the loop,
        and keeps to the first that works (``population.mode`` says which it is then).
        """
        chosen = range(self.population_size) if members is None else members
        if self.mode == "auto":
            return self._choose_mode(args, kwargs, generation, chosen, sigma)
        run = {"rows": self._forward_rows, "vmap": self._forward_vmap, "loop": self._forward_loop}[self.mode]
        return run(args, kwargs, generation, chosen, sigma)

    def _choose_mode(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        generation: int,
        members: Sequence[int],
        sigma: float | None,
    ) -> Any:
        for mode, run in (("rows", self._forward_rows), ("vmap", self._forward_vmap)):
            # Whatever the reason that a mode cannot run this model, the next one can; the last raises as it is.
            with contextlib.suppress(UnsupportedOperationError, RuntimeError, ValueError, TypeError, IndexError):
                out = run(args, kwargs, generation, members, sigma)
                ends = sorted({0, len(members) - 1})
                if all(self._agrees(out, p, args, kwargs, generation, members, sigma) for p in ends):
                    self.mode = mode  # type: ignore[assignment]
                    return out
        self.mode = "loop"
        return self._forward_loop(args, kwargs, generation, members, sigma)

    def _agrees(
        self, out: Any, p: int, args: Any, kwargs: Any, generation: int, members: Sequence[int], sigma: float | None
    ) -> bool:
        own = _slice_rows((args, kwargs), p, len(members))
        with self.member(generation, members[p], sigma=sigma), torch.no_grad():
            expected = tree_flatten(self.model(*own[0], **own[1]))[0]
        got = tree_flatten(_slice_rows(out, p, len(members)))[0]
        return len(got) == len(expected) and all(map(_close, got, expected))

    def _forward_rows(
        self, args: Any, kwargs: Any, generation: int, members: Sequence[int], sigma: float | None
    ) -> Any:
        with self.perturbed(generation, members, sigma=sigma):
            return self.model(*args, **kwargs)

    def _forward_loop(
        self, args: Any, kwargs: Any, generation: int, members: Sequence[int], sigma: float | None
    ) -> Any:
        outputs = []
        for p, member in enumerate(members):
            own = _slice_rows((args, kwargs), p, len(members))
            with self.member(generation, member, sigma=sigma):
                outputs.append(self.model(*own[0], **own[1]))
        return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)

    def _forward_vmap(
        self, args: Any, kwargs: Any, generation: int, members: Sequence[int], sigma: float | None
    ) -> Any:
        self._check(members)
        count = len(members)
        context = MemberContext(None)
        values = self.values(generation, members, MemberContext(count), sigma=self.sigma if sigma is None else sigma)
        parts: dict[str, tuple[Tensor, ...]] = {}
        for name, value in values.items():
            parts[name] = (value.a, value.b) if isinstance(value, PerturbedWeight) else (value.data_P,)  # type: ignore[attr-defined]
        split = tree_map(lambda x: x.reshape(count, -1, *x.shape[1:]) if isinstance(x, Tensor) else x, (args, kwargs))
        dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, split)

        def one(member_parts: dict[str, tuple[Tensor, ...]], inputs: Any) -> Any:
            own: dict[str, Tensor] = {}
            for name, pieces in member_parts.items():
                value = values[name]
                if isinstance(value, PerturbedWeight):
                    own[name] = PerturbedWeight(value.base, *pieces, name=name, kind=value.kind, context=context)
                else:
                    own[name] = pieces[0]
            with self._swapped(own):
                return self.model(*inputs[0], **inputs[1])

        out = torch.vmap(one, in_dims=(0, dims), randomness="error")(parts, split)
        return tree_map(lambda y: y.flatten(0, 1) if isinstance(y, Tensor) and y.ndim > 1 else y, out)

    def verify(self, *args: Any, generation: int = 0, members: Sequence[int] | None = None, **kwargs: Any) -> float:
        """Largest relative difference between the population forward and single members, over the ends of ``members``.

        Raises:
            UnsupportedOperationError: they differ beyond rounding, so rows do not hold the members of this model.
        """
        chosen = range(self.population_size) if members is None else members
        with torch.no_grad():
            out = self._forward_rows(args, kwargs, generation, chosen, None)
            worst = 0.0
            for p in sorted({0, len(chosen) - 1}):
                own = _slice_rows((args, kwargs), p, len(chosen))
                with self.member(generation, chosen[p]):
                    expected = tree_flatten(self.model(*own[0], **own[1]))[0]
                got = tree_flatten(_slice_rows(out, p, len(chosen)))[0]
                for mine, theirs in zip(got, expected, strict=True):
                    if isinstance(mine, Tensor) and mine.is_floating_point():
                        worst = max(worst, _relative_difference(mine, theirs))
                        if not _close(mine, theirs):
                            raise UnsupportedOperationError(
                                f"member {chosen[p]} evaluated in rows differs from the same member alone by "
                                f"{worst:.1e} (relative): this model's activations do not keep the members in their "
                                'leading dimension. Use mode="vmap" or mode="loop"'
                            )
        return worst


class Active:
    """A population while it stands in the place of the model's parameters."""

    def __init__(self, population: Population, values: dict[str, Tensor], context: MemberContext, members: int) -> None:
        self.population, self.values, self.context, self.members = population, values, context, members

    def expand(self, x: Tensor) -> Tensor:
        """One batch for every member: ``(batch, ...)`` to ``(members * batch, ...)``, member by member."""
        return x.repeat(self.members, *([1] * (x.ndim - 1)))

    def split(self, y: Tensor) -> Tensor:
        """``(members * batch, ...)`` to ``(members, batch, ...)``."""
        return y.reshape(self.members, -1, *y.shape[1:])

    def select_rows(self, member_of_row: Tensor) -> None:
        """From now on, row ``i`` of activations belongs to member ``member_of_row[i]`` (a subset, any order).

        Used while generating, to stop computing rows that have finished.
        """
        context = MemberContext(len(member_of_row), len(member_of_row), self.context.layouts)
        chosen: dict[str, Tensor] = {}
        for name, value in self.values.items():
            if isinstance(value, PerturbedWeight):
                a, b = value.a[member_of_row], value.b[member_of_row]
                chosen[name] = PerturbedWeight(value.base, a, b, name=name, kind=value.kind, context=context)
            elif isinstance(value, MemberTensor):
                chosen[name] = MemberTensor(value.data_P[member_of_row], name=name, context=context)
        self.context.members, self.context.rows = context.members, context.rows
        place(self.population.sites, chosen)


def _slice_rows(tree: Any, p: int, members: int) -> Any:
    """Member ``p``'s part of every tensor in a structure whose tensors carry the members in front."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        size = x.shape[0] // members
        return x[p * size : (p + 1) * size]

    return tree_map(cut, tree)


def _relative_difference(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape or isinstance(x, Value):
        return float("inf")
    if x.numel() == 0:
        return 0.0
    scale = y.float().abs().max().clamp_min(1e-12)
    return float(((x.float() - y.float()).abs().max() / scale).nan_to_num(0.0 if _same_nans(x, y) else float("inf")))


def _same_nans(x: Tensor, y: Tensor) -> bool:
    return bool(torch.equal(x.isnan(), y.isnan()))


def _close(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor):
        return bool(x == y)
    if not isinstance(y, Tensor) or x.shape != y.shape:
        return False
    if not x.is_floating_point():
        return True  # chosen tokens or indices may flip on rounding
    return _relative_difference(x, y) <= (1e-3 if x.dtype in (torch.float32, torch.float64) else 0.1)


@contextmanager
def _rows_from_input(model: nn.Module, context: MemberContext, *, fixed: bool) -> Iterator[None]:
    """Read the number of rows off the first tensor that the model (or a direct part of it) is called with."""
    if fixed:
        yield
        return
    depth = 0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal depth
        depth += 1
        if depth == 1:
            tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.ndim > 0]
            sizes = [x.shape[0] for x in tensors if context.members and x.shape[0] % context.members == 0]
            context.rows = sizes[0] if sizes else None

    def after(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    outer = [model, *model.children(), *(part for child in model.children() for part in child.children())]
    for module in dict.fromkeys(outer):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
