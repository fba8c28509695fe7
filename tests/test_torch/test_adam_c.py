"""A step of Adam in C: PyTorch's bits, the size of the change against float64, and what it leaves to PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.torch import Replica
from eggroll.torch.kernels import adam_c
from eggroll.torch.kernels.step_c import BLOCK

pytestmark = pytest.mark.skipif(adam_c.why_not() is not None, reason=f"no C: {adam_c.why_not()}")

SIZES = [1, 15, 16, 17, 1000, BLOCK, BLOCK + 5, 5 * BLOCK + 3]
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


def started(size: int, lr: float, **settings: object) -> tuple[nn.Parameter, torch.optim.Adam, torch.Generator]:
    """A parameter with an optimizer that has made its first step."""
    make = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(size, generator=make), requires_grad=False)
    optimizer = torch.optim.Adam([weight], lr=lr, maximize=True, **settings)
    weight.grad = torch.randn(size, generator=make)
    optimizer.step()
    return weight, optimizer, make


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("lr", "betas", "eps"), [(0.01, (0.9, 0.999), 1e-8), (3.0, (0.6, 0.95), 1e-3)])
def test_steps_have_the_bits_of_pytorchs_optimizer(size, lr, betas, eps, threads):
    expected, optimizer, make = started(size, lr, betas=betas, eps=eps)
    ours, state = expected.detach().clone(), copied(optimizer.state[expected])
    before_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for turn in range(5):
            gradient = torch.randn(size, generator=make) * 10.0 ** (-3 * turn)
            gradient[:: 7 + turn] = 0.0
            expected.grad = gradient.clone()
            optimizer.step()
            weights, before = torch.empty(size, dtype=torch.bfloat16), ours.clone()
            squares = adam_c.step_(ours, gradient, weights, state, rate=lr, betas=betas, eps=eps)
            assert torch.equal(ours, expected)
            assert torch.equal(weights, expected.bfloat16())
            for name, value in optimizer.state[expected].items():
                assert torch.equal(state[name], value), name
            assert squares == pytest.approx((ours.double() - before.double()).square().sum().item(), rel=1e-5)
    finally:
        torch.set_num_threads(before_threads)


def test_the_size_of_a_change_does_not_depend_on_threads():
    found = []
    for threads in (1, 2):
        weight, optimizer, make = started(9 * BLOCK + 7, 0.1)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            gradient = torch.randn(weight.shape, generator=make)
            found.append(adam_c.step_(weight.detach(), gradient, None, optimizer.state[weight], rate=0.1, **ADAM))
        finally:
            torch.set_num_threads(before)
    assert found[0] == found[1]


def test_what_is_left_to_pytorch(monkeypatch):
    weight, optimizer, _ = started(64, 0.1)
    master, state, gradient = weight.detach(), optimizer.state[weight], torch.ones(64)
    start, before = master.clone(), copied(state)

    def step(master=master, gradient=gradient, weights=None, state=state, betas=(0.9, 0.999)):
        return adam_c.step_(master, gradient, weights, state, rate=0.1, betas=betas, eps=1e-8)

    assert step(master=master.double()) is None
    assert step(gradient=gradient.double()) is None
    assert step(gradient=gradient[:32]) is None
    assert step(weights=master.half()) is None
    assert step(state={**state, "exp_avg": state["exp_avg"].double()}) is None
    assert step(state={**state, "exp_avg_sq": state["exp_avg_sq"][:32]}) is None
    assert step(betas=(0.5, 0.999)) is None  # PyTorch's lerp has another form from there on
    monkeypatch.setattr(adam_c, "_agrees", lambda: False)
    assert step() is None
    assert torch.equal(master, start)
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_where_pytorch_rounds_otherwise_it_takes_the_steps(monkeypatch):
    """What the trial in each process is there for: an optimizer that is off by one unit in the last place."""

    class Other(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            (weight,) = self.param_groups[0]["params"]
            weight[-1] = torch.nextafter(weight[-1], torch.tensor(2.0**100))

    adam_c._agrees.cache_clear()
    monkeypatch.setattr(torch.optim, "Adam", Other)
    try:
        assert adam_c.why_not() == "PyTorch's Adam rounds otherwise on this machine"
    finally:
        adam_c._agrees.cache_clear()


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_has_the_same_weights_with_it_and_without(dtype, optimizer, monkeypatch):
    def run() -> tuple[Replica, list[float]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Linear(70, 9)).to(dtype)
        config = ESConfig(population_size=8, rank=2, sigma=0.05, lr=0.3, seed=1, optimizer=optimizer)
        replica = Replica(model, config, kinds=("matrix", "vector"))
        norms = []
        for generation in range(5):
            scores = np.random.default_rng(generation).standard_normal(8).astype(np.float32)
            norms.append(replica.update(generation, scores, 0.3 / (1 + generation)))
            if generation == 1:
                with torch.no_grad():
                    model[0].weight[3, 4] = 2.0  # what is changed from outside is taken over
        return replica, norms

    assert adam_c.why_not() is None  # the trial is over then
    taken: list[int] = []
    step = adam_c._step
    monkeypatch.setattr(adam_c, "_step", lambda *given: taken.append(1) or step(*given))
    with_c, norms = run()
    assert len(taken) == 4 * 4  # of four parameters, all steps but the first
    monkeypatch.setattr(adam_c, "_agrees", lambda: False)
    without, plain_norms = run()
    assert len(taken) == 4 * 4
    for name, tensor in with_c.state_tensors().items():
        assert torch.equal(tensor, without.state_tensors()[name]), name
    assert norms == pytest.approx(plain_norms, rel=1e-5)
    assert with_c.updater.turning.cosine == without.updater.turning.cosine


@pytest.mark.parametrize("decay", ["weight_decay", "anchored_weight_decay"])
def test_weights_that_decay_are_left_to_pytorch(decay, monkeypatch):
    monkeypatch.setattr(adam_c, "step_", lambda *a, **k: pytest.fail("not with decay"))
    config = ESConfig(population_size=4, sigma=0.1, lr=0.1, optimizer="adamw", **{decay: 0.1})
    replica = Replica(nn.Sequential(nn.Linear(8, 8)), config, kinds=("matrix",))
    for generation in range(2):
        replica.update(generation, np.arange(4, dtype=np.float32), 0.1)
