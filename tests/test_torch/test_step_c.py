"""A step of SGD in C: PyTorch's bits, the size of the change against float64, and what it leaves to PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.torch import Replica
from eggroll.torch.kernels import step_c

pytestmark = pytest.mark.skipif(step_c.why_not() is not None, reason=f"no C: {step_c.why_not()}")

SIZES = [1, 15, 16, 17, 1000, step_c.BLOCK, step_c.BLOCK + 5, 5 * step_c.BLOCK + 3]


def numbers(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=make), torch.randn(size, generator=make)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rate", [0.05, 1e-6, 3.0])
def test_a_step_has_the_bits_of_pytorchs_optimizer(size, rate, threads):
    master, gradient = numbers(size)
    expected = nn.Parameter(master.clone(), requires_grad=False)
    expected.grad = gradient
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.optim.SGD([expected], lr=rate, maximize=True).step()
        weights, start = torch.empty(size, dtype=torch.bfloat16), master.clone()
        squares = step_c.step_(master, gradient, weights, rate)
    finally:
        torch.set_num_threads(before_threads)
    assert torch.equal(master, expected)
    assert torch.equal(weights, expected.bfloat16())
    exact = (master.double() - start.double()).square().sum().item()
    assert squares == pytest.approx(exact, rel=1e-5)


def test_the_size_of_a_change_does_not_depend_on_threads():
    found = []
    for threads in (1, 2):
        master, gradient = numbers(9 * step_c.BLOCK + 7)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(step_c.step_(master, gradient, None, 0.1))
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]


def test_numbers_at_the_ends_of_the_range_round_as_pytorch_rounds_them():
    values = [math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-40, 1.00390625, 1.01171875]
    master = torch.tensor(values * 3)
    weights = torch.empty(24, dtype=torch.bfloat16)
    step_c.step_(master, torch.zeros(24), weights, 1.0)
    torch.testing.assert_close(weights, torch.tensor(values * 3).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
def test_a_weight_that_was_changed_from_outside_is_seen(size):
    master, _ = numbers(size)
    weights = master.bfloat16()
    assert step_c.is_rounded(master, weights) is True
    for place in {0, size // 2, size - 1}:
        changed = weights.clone()
        changed[place] += 1
        assert step_c.is_rounded(master, changed) is False


def test_what_is_left_to_pytorch():
    master, gradient = numbers(64)
    start = master.clone()
    for other in (master.double(), master.view(8, 8).t(), master.half()):
        assert step_c.step_(other, gradient, None, 0.1) is None
    assert step_c.step_(master, gradient.double(), None, 0.1) is None
    assert step_c.step_(master, gradient, master.half(), 0.1) is None
    assert step_c.step_(master, gradient[:32], None, 0.1) is None
    assert step_c.step_(torch.empty(0), torch.empty(0), None, 0.1) is None
    assert step_c.is_rounded(master, master.half()) is None
    assert torch.equal(master, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_has_the_same_weights_with_it_and_without(dtype, monkeypatch):
    def run() -> tuple[Replica, list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 9)).to(dtype)
        config = ESConfig(population_size=8, rank=2, sigma=0.05, lr=0.3, seed=1)
        replica = Replica(model, config, kinds=("matrix", "vector"))
        norms = []
        for generation in range(4):
            scores = np.random.default_rng(generation).standard_normal(8).astype(np.float32)
            norms.append(replica.update(generation, scores, 0.3))
            if generation == 1:
                with torch.no_grad():
                    model[0].weight[3, 4] = 2.0  # what is changed from outside is taken over
        return replica, norms

    with_c, norms = run()
    calls: list[int] = []
    monkeypatch.setattr(step_c, "_entry", lambda: calls.append(1) or "none")
    without, plain_norms = run()
    assert calls
    for name, tensor in with_c.state_tensors().items():
        assert torch.equal(tensor, without.state_tensors()[name]), name
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    assert with_c.updater.turning.cosine == without.updater.turning.cosine


def test_an_optimizer_of_the_users_own_is_asked():
    """A factory may make anything, so nothing is done in its place, and it may keep the gradients it was given."""
    kept: list[Tensor] = []

    class Keeping(torch.optim.SGD):
        def step(self, closure=None):
            kept.append(self.param_groups[0]["params"][0].grad)
            return super().step(closure)

    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    config = ESConfig(population_size=4, sigma=0.1, lr=0.1)
    replica = Replica(model, config, kinds=("matrix",), factory=lambda p: Keeping(p, lr=0.1, maximize=True))
    record = UpdateRecord(generation=0, sigma=0.1, shaped_fitness=(1.0, -1.0, 0.5, 0.25), lr=0.1)
    replica.apply(record)
    assert len(kept) == 2
    assert not torch.equal(*kept)
