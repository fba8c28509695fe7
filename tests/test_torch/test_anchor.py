"""Anchored weight decay against the float64 oracle, on resume, and where it is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from eggroll.core import oracle
from eggroll.core.config import ESConfig
from eggroll.errors import CheckpointError, ConfigError
from eggroll.torch import Replica

DECAY, ANCHOR = 0.3, 2.0
SCORES = [np.random.default_rng(generation).normal(size=6) for generation in range(6)]


def network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype).eval()


def config(optimizer="sgd", **settings):
    given = {"lr": 0.05, "lr_decay": 0.8, "sigma": 0.1, "rank": 2, "anchored_weight_decay": ANCHOR, **settings}
    return ESConfig(population_size=6, optimizer=optimizer, **given)


def replica(optimizer="sgd", dtype=torch.float32, seed=0, **settings):
    return Replica(network(dtype, seed), config(optimizer, **settings), kinds=("matrix", "vector"))


def tell(made, generations):
    for generation in generations:
        made.tell(generation, SCORES[generation])


def weights(made):
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_equals_the_oracle(optimizer, decay):
    """Estimates of the oracle, and the rules in float64; ascent, so the estimate is minus a loss's gradient."""
    made = replica(optimizer, weight_decay=decay)
    settings, specs = made.config, made.population.specs
    start = {name: value.double().numpy() for name, value in weights(made).items()}
    by_hand = {name: value.copy() for name, value in start.items()}
    first, second = ({name: np.zeros_like(w) for name, w in by_hand.items()} for _ in range(2))
    for generation in range(5):
        shaped, lr = settings.shape(SCORES[generation]), settings.lr_at(generation)
        for spec in specs:
            name, w = spec.name, by_hand[spec.name]
            g = oracle.es_gradient(spec, shaped, rank=2, seed=settings.seed, generation=generation)
            pull = decay * w + ANCHOR * (w - start[name])
            if optimizer == "adamw":
                w -= lr * pull
            else:
                g = g - pull
            if optimizer == "sgd":
                w += lr * g
            elif optimizer == "momentum":
                first[name] = g if generation == 0 else 0.9 * first[name] + g
                w += lr * first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9 ** (generation + 1)), second[name] / (1 - 0.999 ** (generation + 1))
                w += lr * m / (np.sqrt(v) + 1e-8)
        tell(made, [generation])
    for name, w in by_hand.items():
        assert not np.allclose(w, start[name], atol=1e-3)
        np.testing.assert_allclose(weights(made)[name].numpy(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_back_to_the_start(dtype):
    """Without an estimate the distance from the start shrinks by ``1 - lr c`` in each step."""
    made = replica(dtype=dtype)
    start = {name: value.double() for name, value in weights(made).items()}
    tell(made, [0])
    far = {name: (value.double() - start[name]).norm() for name, value in made.updater._targets.items()}
    for generation in range(1, 4):
        made.update(generation, np.zeros(6, np.float32), 0.1)
    for name, value in made.updater._targets.items():
        left = (value.double() - start[name]).norm() / far[name]
        assert float(left) == pytest.approx((1 - 0.1 * ANCHOR) ** 3, rel=1e-3)


@pytest.mark.parametrize("rounding", ["master", "stochastic", "nearest"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_goes_on_bit_for_bit(optimizer, rounding):
    """From a checkpoint, and from the log alone; the start is that of the model, not that of the checkpoint."""
    given = {"optimizer": optimizer, "rounding": rounding, "dtype": torch.bfloat16}
    whole = replica(**given)
    tell(whole, range(6))
    half = replica(**given)
    tell(half, range(3))
    state = {name: tensor.clone() for name, tensor in half.state_tensors().items()}
    again = replica(**given)
    again.load_state_tensors(state)
    tell(again, range(3, 6))
    assert equal(weights(again), weights(whole))
    plain = replica(**given, anchored_weight_decay=0.0)
    tell(plain, range(6))
    assert not equal(weights(plain), weights(whole))


def test_another_start_is_refused():
    made, other = replica(), replica(seed=1)
    tell(made, range(2))
    before = weights(other)
    with pytest.raises(
        CheckpointError, match=r"(?s)4 parameters \(0.weight, \.\.\.\) began with others here; make the"
    ):
        other.updater.load_state_tensors(made.updater.state_tensors())
    assert equal(weights(other), before)
    plain = replica(anchored_weight_decay=0.0)
    with pytest.raises(CheckpointError, match=r"written without anchored_weight_decay \(no digest of the start of 0.w"):
        made.load_state_tensors(plain.state_tensors())


def test_a_pull_that_cannot_be():
    with pytest.raises(ConfigError, match=r"anchored_weight_decay \(=-1\) must be"):
        ESConfig(anchored_weight_decay=-1)


def test_without_it_there_is_no_copy():
    made = replica(anchored_weight_decay=0.0)
    assert made.updater._anchor is None
    assert not any(name.startswith("anchor/") for name in made.state_tensors())
