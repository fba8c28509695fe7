"""Any module as functions of its parameters and their perturbations, evaluated as a population without tracing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eggroll.errors import ConfigError
from eggroll.torch.active import Active, PerturbedModel
from eggroll.torch.hazards import refuse_hazards
from eggroll.torch.layout.rows import addresses, member_data
from eggroll.torch.perturbed import MemberContext, MemberTensor, PerturbedWeight

MEMBERS_OF_CHECK = 24
"""Members of the population with which a module's first call is checked; more than any check needs."""


def get_params_dict(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module by name, tied ones once, sharing its memory: updating them updates the module."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def make_perturbed_forward_fn(module: nn.Module) -> PerturbedForward:
    """A module's forward as a function of parameters and perturbations.

        >>> forward, forward_clean = make_perturbed_forward_fn(module)
        >>> params = get_params_dict(module)
        >>> perts = generate_perturbations(get_weight_shapes(params), 256, 1, 0.1, NoiseKey(0))
        >>> y = forward(x, params, perts)         # x (256, batch, n), or (1, batch, n) for all: (256, batch, m)
        >>> y = forward_clean(x[0], params)       # (batch, m)

    The unmodified module is run once for all members (:class:`eggroll.torch.Population`), so it may have convolutions,
    attention, recurrence, or control flow that does not depend on data. Call ``module.eval()`` first.

    Raises:
        UnsupportedOperationError: on the first call, if the module mixes the rows of a batch.
    """
    return PerturbedForward(module)


class PerturbedForward:
    """``forward(x, params, perts)``; unpacks into itself and its ``clean`` counterpart."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._populations: dict[frozenset[str], PerturbedModel] = {}

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return iter((self, self.clean))

    def clean(self, x: Any, params: Mapping[str, Tensor]) -> Any:
        """The module with ``params``, without perturbations."""
        return torch.func.functional_call(self.module, dict(params), (x,))

    def __call__(self, x: Tensor, params: Mapping[str, Tensor], perts: Mapping[str, Mapping[str, Tensor]]) -> Any:
        """Outputs of all members, ``(P, batch, ...)``.

        Args:
            x: ``(P, batch, ...)``, or ``(1, batch, ...)``: the same for all members.
            params: the module's parameters by name; those that are left out are the module's own.
            perts: perturbations of some of its matrices and kernels.

        Raises:
            ConfigError: perturbations of a parameter that the module does not have, or an input without members.
        """
        population = self._population(frozenset(perts))
        members = next(iter(perts.values()))["U"].shape[0]
        if x.ndim < 2 or x.shape[0] not in (1, members) or x.numel() == 0:
            raise ConfigError(
                f"x {tuple(x.shape)} must be (pop={members}, batch, ...), or (1, batch, ...) for an input that all "
                "members share, with at least one row"
            )
        rows = members * x.shape[1]
        single = members == 1
        unknown = sorted(set(params) - set(population.sites))
        if unknown:
            raise ConfigError(
                f"params has {unknown[:3]}, which the module does not have; its parameters are "
                f"{', '.join(list(population.sites)[:8])}{', ...' if len(population.sites) > 8 else ''}"
            )
        refuse_hazards(self.module, members)
        context = population.context(None if single else members, None if single else rows)
        # Other parameters than the module's own are the same for all members as well.
        context.constants |= addresses(list(params.values()))
        values = self._values(population, params, perts, context)
        with population.standing_in(Active(population, values, context, members)) as active:
            inputs = active.expand(x[0]) if x.shape[0] == 1 else x.flatten(0, 1)
            outputs = self.module(inputs)
        if single:
            return tree_map(lambda y: y.unsqueeze(0) if isinstance(y, Tensor) else y, outputs)

        def split(y: Any) -> Any:
            if isinstance(y, MemberTensor | PerturbedWeight):
                return member_data(y.by_member(), members, rows)
            if not isinstance(y, Tensor) or y.ndim == 0:
                return y
            # A recurrent layer's last state has the rows in its second dimension.
            dim = next((dim for dim in range(min(y.ndim, 2)) if y.shape[dim] == rows), 0)
            return y.unflatten(dim, (members, -1)).movedim(dim, 0)

        return tree_map(split, outputs)

    def _population(self, keys: frozenset[str]) -> PerturbedModel:
        """The population that knows where the perturbed parameters are, made once for each set of them."""
        found = self._populations.get(keys)
        if found is None:
            names = [name for name, _ in self.module.named_parameters()]
            unknown = sorted(keys - set(names))
            if unknown or not keys:
                raise ConfigError(
                    f"perts has {unknown}, which the module does not have; its parameters are {', '.join(names[:8])}"
                    f"{', ...' if len(names) > 8 else ''}"
                )
            exclude = [name for name in names if name not in keys]
            found = PerturbedModel(self.module, population_size=MEMBERS_OF_CHECK, exclude=exclude)
            self._populations[keys] = found
        return found

    def _values(
        self,
        population: PerturbedModel,
        params: Mapping[str, Tensor],
        perts: Mapping[str, Mapping[str, Tensor]],
        context: MemberContext,
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {
            name: params[name].detach() for name in population.sites if name in params and name not in perts
        }
        for spec in population.specs:
            center = params.get(spec.name, population.parameter(spec.name)).detach()
            a, b = (perts[spec.name][factor].transpose(1, 2) for factor in ("U", "V"))
            if context.single:
                a, b = a[0], b[0]
            # Experts are one matrix here, (E, m n), so that no rule for a matrix of each expert holds.
            kind = "other" if spec.kind == "experts" else spec.kind
            values[spec.name] = PerturbedWeight(center, a, b, name=spec.name, kind=kind, context=context)
        return values
