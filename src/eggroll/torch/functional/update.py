"""From fitness to the next parameters: shaping, the estimate, the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor

from eggroll.core.fitness import centered_rank, replace_non_finite
from eggroll.errors import ConfigError, RewardError
from eggroll.torch.functional.config import EggrollConfig
from eggroll.torch.functional.perturbations import (
    NoiseKey,
    Perturbations,
    generate_perturbations,
    get_weight_shapes,
    split_perturbations,
)
from eggroll.torch.updater import round_stochastically

FitnessFn = Callable[[Mapping[str, Tensor], Perturbations], Tensor]


def normalize_fitnesses(fitnesses: Tensor) -> Tensor:
    """Centered ranks in [-0.5, 0.5], shape ``(P,)``, float32; ties share their mean rank, equal scores become 0.

    NaN and infinities count as the worst of the generation, with a warning (outside of ``torch.compile``).

    Raises:
        ConfigError: not a vector of at least two scores.
    """
    if fitnesses.ndim != 1 or fitnesses.shape[0] < 2:
        raise ConfigError(f"fitnesses must be (population_size,), at least two; got {tuple(fitnesses.shape)}")
    return centered_rank(replace_non_finite(fitnesses)).float()


def compute_gradients(
    fitnesses: Tensor, perts: Mapping[str, Mapping[str, Tensor]], population_size: int | None = None
) -> dict[str, Tensor]:
    """``grad = (1/sqrt(P)) sum_p f_p U_p^T V_p`` for every weight, ``(m, n)``; ascending it raises the fitness.

    This is the scale of HyperscaleES, whose perturbations carry sigma too: ``sigma sqrt(P)`` times the ``es_gradient``
    of the rest of eggroll (docs/scale-conventions.md). It is one product over stacked factors, never
    ``(sum f U)^T (sum f V)``: that has the cross terms of different members and rank ``r``, where the estimate has rank
    ``min(P r, m, n)``.

    Args:
        fitnesses: ``(P,)`` shaped fitness, for example from :func:`normalize_fitnesses`.
        perts: the perturbations that were evaluated.
        population_size: P; checked if given.

    Returns:
        float32 (float64 for float64 perturbations).

    Raises:
        ConfigError: the number of fitnesses is not that of the members.
    """
    members = next(iter(perts.values()))["U"].shape[0]
    if fitnesses.shape != (members,) or population_size not in (None, members):
        raise ConfigError(
            f"fitnesses {tuple(fitnesses.shape)} and population_size (={population_size}) must be those of the "
            f"{members} members in perts: one number for each"
        )
    grads = {}
    for key, factors in perts.items():
        u_Prm, v_Prn = factors["U"], factors["V"]
        wide = torch.promote_types(u_Prm.dtype, torch.float32)
        weights = fitnesses.to(dtype=wide, device=u_Prm.device) / members**0.5
        left = (u_Prm.to(wide) * weights.view(-1, 1, 1)).flatten(0, 1)
        grads[key] = left.T @ v_Prn.to(wide).flatten(0, 1)
    return grads


@torch.no_grad()
def update_params(
    params: MutableMapping[str, Tensor],
    grads: Mapping[str, Tensor],
    lr: float,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """``params[key] += lr * grads[key]``, in place; kernels of convolutions keep their shape.

    Steps are mostly smaller than half the spacing of bfloat16 and would vanish, so bfloat16 parameters are rounded up
    or down at random with the right mean.

    Args:
        params: the parameters; those without a gradient stay as they are.
        grads: from :func:`compute_gradients`.
        lr: learning rate.
        generator: for the rounding of bfloat16; the default generator of the device otherwise.

    Raises:
        ConfigError: a gradient for a parameter that is not there or has another size, or a float16 parameter.
    """
    for key, gradient in grads.items():
        if key not in params:
            raise ConfigError(f"grads has {key!r}, which is not in params ({', '.join(map(repr, list(params)[:8]))})")
        parameter = params[key]
        if parameter.numel() != gradient.numel():
            raise ConfigError(f"{key!r}: the gradient {tuple(gradient.shape)} does not fit {tuple(parameter.shape)}")
        step = gradient.reshape(parameter.shape)
        if parameter.dtype == torch.float16:
            raise ConfigError(f"{key!r} is float16, where most steps would be lost; keep params in float32 or bfloat16")
        if parameter.dtype == torch.bfloat16:
            wide = parameter.float().add_(step, alpha=lr)
            bits = torch.randint(1 << 16, wide.shape, generator=generator, device=wide.device, dtype=torch.int32)
            parameter.copy_(round_stochastically(wide, bits))
        else:
            parameter.add_(step.to(parameter.dtype), alpha=lr)


@torch.no_grad()
def eggroll_step(
    params: MutableMapping[str, Tensor],
    fitness_fn: FitnessFn,
    config: EggrollConfig,
    generation: int = 0,
    *,
    gen: torch.Generator | None = None,
) -> Tensor:
    """One generation: draw, evaluate, shape by ranks, update ``params`` in place. Returns the raw fitness ``(P,)``.

        >>> def fitness(params, perts):
        ...     y = perturbed_forward(x[None], params["w"], None, perts, "w")  # (P, batch, out)
        ...     return -(y - target).square().mean(dim=(1, 2))
        >>> for generation in range(100):
        ...     scores = eggroll_step(params, fitness, config, generation)

    Args:
        params: the parameters, matrices and kernels of which are evolved.
        fitness_fn: ``(params, perts) -> (members,)``, higher is better; called once, or once for each
            ``config.members_per_forward`` members, whose perturbations it is given.
        config: the settings.
        generation: which one this is; noise and schedules are functions of it.
        gen: a generator to draw from instead of by address ``(config.seed, generation)``.

    Raises:
        RewardError: ``fitness_fn`` returned something else than one number for each member.
    """
    device = next(iter(params.values())).device
    sigma = config.sigma * config.sigma_decay**generation
    source = NoiseKey(config.seed, generation) if gen is None else gen
    size = config.population_size
    drawn = generate_perturbations(
        get_weight_shapes(params), size, config.rank, sigma, source, device=device, antithetic=config.antithetic
    )
    perts = {key: {name: x.to(params[key].dtype) for name, x in factors.items()} for key, factors in drawn.items()}
    # One tensor for all scores: small ones that outlive each part would split the memory that the next part needs.
    fitness: Tensor | None = None
    first = 0
    for part in split_perturbations(perts, config.members_per_forward or size):
        scores = fitness_fn(params, part)
        members = next(iter(part.values()))["U"].shape[0]
        if not isinstance(scores, Tensor) or scores.shape != (members,):
            given = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
            raise RewardError(f"fitness_fn must return a tensor ({members},), one score for each member; got {given}")
        fitness = scores.new_empty(size) if fitness is None else fitness
        fitness[first : first + members] = scores
        first += members
    assert fitness is not None
    grads = compute_gradients(normalize_fitnesses(fitness), perts, size)
    # The rounding of bfloat16 parameters is a function of seed and generation, too.
    rounding = torch.Generator(device).manual_seed((config.seed * 1_000_003 + generation) % 2**63)
    update_params(params, grads, config.lr * config.lr_decay**generation, generator=rounding)
    return fitness
