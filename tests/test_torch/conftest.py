"""The check that tests of populations share: each member equals the model with that member's weights materialized."""

import copy
import warnings
from collections.abc import Mapping
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from eggroll.core.oracle import member_params
from eggroll.torch import Population
from eggroll.torch.compare import relative_difference


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


def fill(model):
    """Weights that make every parameter matter: nothing at its initial zero or one."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.normal_(parameter, mean=0.0 if "bias" in name else 0.6, std=0.15)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def oracle_weights(population, member, generation, sigma=None):
    """The weights of one member from the float64 oracle, every parameter of the model in its own dtype."""
    center = dict(population.model.named_parameters())
    weights = member_params(
        {name: parameter.detach().double().numpy() for name, parameter in center.items()},
        population.specs,
        member,
        sigma=population.sigma if sigma is None else sigma,
        rank=population.noise.rank,
        seed=population.noise.seed,
        generation=generation,
        antithetic=population.antithetic,
        noise_reuse=population.noise.noise_reuse,
    )
    return {name: torch.as_tensor(np.asarray(weights[name])).to(center[name].dtype) for name in center}


def tensors_of(outputs):
    """The floating tensors of a model's outputs, caches aside."""
    if isinstance(outputs, Mapping):
        outputs = {key: x for key, x in outputs.items() if "past_key" not in key and "cache" not in key}
    return [x for x in tree_flatten(outputs)[0] if isinstance(x, torch.Tensor) and x.is_floating_point()]


def materialized(population, member, generation, args, kwargs):
    """Outputs of one member's materialized model."""
    # The batched experts that a population switches to are not the reference: the plain loop over experts is.
    if hasattr(population.model, "set_experts_implementation") and any("expert" in n for n in dict(population.sites)):
        population.model.set_experts_implementation("eager")
    return torch.func.functional_call(population.model, oracle_weights(population, member, generation), args, kwargs)


def cast(inputs, dtype):
    return tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, inputs)


def members_agree(
    model, inputs, *, dtype=torch.float64, tolerance=None, members=None, generation=3, shared=(), **options
):
    """Every member of the population forward against its materialized twin; returns the largest relative difference.

    ``inputs(batch)`` or a tuple: args of one member's batch. Different members get different inputs.
    """
    model = copy.deepcopy(model).to(dtype)
    population = Population(model, **{"population_size": 4, "sigma": 0.1, "rank": 2, **options})
    chosen = range(population.population_size) if members is None else members
    args, kwargs = cast(inputs, dtype)
    own = [tree_map(partial(vary, p), (args, kwargs)) for p in range(len(chosen))]
    dim = population.batch_dim
    joint_args, joint_kwargs = tree_map(lambda *x: torch.cat(x, dim) if isinstance(x[0], torch.Tensor) else x[0], *own)
    joint_kwargs.update({key: kwargs[key] for key in shared})
    with population.perturbed(generation, members) as active:
        outputs = model(*joint_args, **joint_kwargs)
    got = [active.split(x) for x in tensors_of(outputs)]
    assert got
    worst = 0.0
    for p, member in enumerate(chosen):
        member_args, member_kwargs = own[p]
        member_kwargs.update({key: kwargs[key] for key in shared})
        expected = tensors_of(materialized(population, member, generation, member_args, member_kwargs))
        assert len(expected) == len(got)
        for mine, theirs in zip(got, expected, strict=True):
            worst = max(worst, relative_difference(mine[p], theirs))
    allowed = tolerance or {torch.float64: 1e-6, torch.float32: 1e-5}[dtype]
    assert worst <= allowed, f"members differ by {worst:.2e} (allowed {allowed:.0e})"
    return worst


def vary(p, x):
    """Another input for every member: other numbers, other ids, the same masks."""
    if not isinstance(x, torch.Tensor) or p == 0 or x.dtype == torch.bool:
        return x
    if x.is_floating_point():
        return x + 0.3 * torch.sin(torch.arange(x.numel(), dtype=x.dtype).view(x.shape) * (p + 1))
    if x.max() <= 1:
        return x  # an attention mask
    return (x + 7 * p) % 90 + 3


@pytest.fixture
def agree():
    return members_agree


@pytest.fixture
def filled():
    return fill


@pytest.fixture
def weights_of():
    return oracle_weights
