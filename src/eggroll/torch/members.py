"""The members of a population: which parameters are perturbed, and what stands in their place for each member."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

import eggroll.torch.ops  # noqa: F401  (installs the rules of values)
from eggroll.core.address import member_of
from eggroll.core.select import KINDS, ParameterSpec, asked_for, select
from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch.layout.rows import constants_of
from eggroll.torch.layout.split import Form, Found
from eggroll.torch.noise import CACHE_BYTES, Noise
from eggroll.torch.parameters import Site, parameter_sites, parameter_specs, refuse_unready
from eggroll.torch.perturbed import Layout, MemberContext, MemberTensor, PerturbedWeight, Use
from eggroll.torch.quantized.formats import refuse_raw
from eggroll.torch.quantized.grid import Grid
from eggroll.torch.quantized.tensor import grid_of
from eggroll.torch.scaled import ScaledWeight
from eggroll.torch.state import Keeper

logger = logging.getLogger(__name__)


class Members:
    """The selected parameters of a model, their noise, and the values of any members.

    Args: see :class:`eggroll.torch.Population`.

    Attributes:
        specs: the perturbed parameters.
        sites: where each parameter of the model is used.
        noise: what members are drawn from.
        keeper: of what the model holds besides its parameters.
        picks: whether the model picks rows by their numbers, so that these have to know their members.
        draws: whether the model draws random numbers of its own; ``None`` until it was called.
        used: names of the parameters whose values an operation was seen to get.
        told_unused: whether it was said which parameters the model does not use.
        watched: whether a call was seen to use values only, and not the parameters themselves.
        plain_loop: whether members one at a time need plain weights, because the model does not take values.
        layouts: what is known about the layout of activations; see :class:`MemberContext`.
        found: outputs that hold rows elsewhere than in the batch's dimension; see :mod:`eggroll.torch.layout.split`.
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
        kinds: Sequence[str] = KINDS,
        batch_dim: int = 0,
        cache_bytes: int = CACHE_BYTES,
        scales: bool = False,
    ) -> None:
        if antithetic and population_size % 2:
            raise ConfigError(
                f"population_size (={population_size}) must be even when antithetic=True; use {population_size + 1} "
                "or antithetic=False"
            )
        if batch_dim not in (0, 1):
            raise ConfigError(f"batch_dim (={batch_dim!r}) must be 0, or 1 for time-major inputs")
        lazy = [(name, x) for name, x in model.named_parameters() if isinstance(x, UninitializedParameter)]
        refuse_unready(lazy)  # nothing can be said of what has no shape
        self.model = model
        self.population_size, self.sigma, self.antithetic = population_size, sigma, antithetic
        self.batch_dim = batch_dim
        self.sites: dict[str, list[Site]] = parameter_sites(model)
        include = [target_modules] if isinstance(target_modules, str) else target_modules
        exclude = [exclude] if isinstance(exclude, str) else exclude
        specs = parameter_specs(model)
        others = refuse_raw(model, include=include, exclude=exclude, kinds=kinds)
        chosen = select([*specs, *others], include=include, exclude=exclude, kinds=kinds)
        left = [
            spec
            for spec in specs
            if not spec.can_be_perturbed and asked_for(spec, include=include, exclude=exclude, kinds=kinds)
        ]
        if left:
            logger.warning(
                "%d parameters are left as they are, as noise cannot be added to their dtype: %s",
                len(left),
                ", ".join(f"{spec.name} ({spec.dtype})" for spec in left[:3]) + (", ..." if len(left) > 3 else ""),
            )
        self.specs: list[ParameterSpec] = [spec for spec in chosen if spec.size]  # some models have empty ones
        fixed = [spec.name for spec in self.specs if not self.sites[spec.name]]
        if fixed:
            raise UnsupportedOperationError(
                f"{', '.join(fixed[:3])}{' and others' if len(fixed) > 3 else ''} belong to a TorchScript module, "
                "whose parameters cannot be replaced. Use the module that it was made from, or leave them alone "
                f"(exclude={fixed[:3]})"
            )
        refuse_unready((spec.name, self.parameter(spec.name)) for spec in self.specs)
        if scales:
            self.specs = [_of_scales(spec, grid_of(self.parameter(spec.name))) for spec in self.specs]
        self.keeper = Keeper(model)
        self.noise = Noise(self.specs, rank, seed, noise_reuse, cache_bytes)
        self.layouts: dict[Use, Layout] = {}
        self.found: dict[Form, Found] = {}
        self.draws: bool | None = None
        self.used: set[str] = set()
        self.told_unused = self.watched = self.plain_loop = self.writes_inputs = self.mixes_numbers = False
        self.picks = False

    @property
    def names(self) -> list[str]:
        """Of the perturbed parameters."""
        return [spec.name for spec in self.specs]

    @property
    def num_pairs(self) -> int:
        """Draws per generation: half the members with antithetic pairs, all of them otherwise."""
        return self.population_size // 2 if self.antithetic else self.population_size

    @property
    def device(self) -> torch.device:
        """Where the perturbed parameters are."""
        return self.parameter(self.specs[0].name).device

    def parameter(self, name: str) -> nn.Parameter:
        """The center of a parameter, also while it is swapped."""
        return self.sites[name][0].parameter

    def prepare(self, generation: int) -> bool:
        """Draw a generation's noise now if it fits into the cache; whether it did. Speed only."""
        return self.noise.prepare(generation, self.num_pairs, self.device)

    def context(self, members: int | None, rows: int | None = None) -> MemberContext:
        """What the values of one forward share; ``members`` is ``None`` for a single one."""
        if members is None:
            return MemberContext(None)
        return MemberContext(
            members, rows, self.layouts, batch_dim=self.batch_dim, constants=constants_of(self.model), picks=self.picks
        )

    def values(
        self, generation: int, members: Sequence[int], context: MemberContext, *, sigma: float
    ) -> dict[str, Tensor]:
        """What stands in the place of each selected parameter for the given members (in any order, also repeated)."""
        first, last = (member_of(member, antithetic=self.antithetic).pair for member in (min(members), max(members)))
        draws = self.noise.draw(generation, range(first, last + 1), self.device)
        # As member_of says, for all of them: which draw each member has, and with which sign.
        index = torch.tensor(members, device=self.device)
        signs = 1.0 - 2.0 * (index % 2) if self.antithetic else torch.ones(len(members), device=self.device)
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
            value = ScaledWeight if spec.scale_groups else PerturbedWeight
            return value(center, a, b, name=spec.name, kind=spec.kind, context=context)
        noise = draws.view(-1, *spec.shape)[index] * (signs * sigma).view(-1, *([1] * len(spec.shape)))
        data = (center.to(torch.promote_types(center.dtype, torch.float32)) + noise).to(center.dtype)
        return data[0] if context.single else MemberTensor(data, name=spec.name, context=context)


def _of_scales(spec: ParameterSpec, grid: Grid | None) -> ParameterSpec:
    """A quantized matrix perturbed by its scales; anything else as it is."""
    if grid is None:
        return spec
    return dataclasses.replace(spec, scale_groups=grid.scales()[0].shape[1])
