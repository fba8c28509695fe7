"""One table for everything that evolves: every kind of worker goes through the same checks.

A module, a language model, policies in JAX and on Gymnasium, the integer language model and its floating-point twin,
a recipe, and pools of workers: whatever a loop can hold keeps the promises of :class:`eggroll.loop.Worker`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tiny_models import write_llama
from torch import nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.distributed import LocalPool, TorchWorker
from eggroll.loop import Evaluation, Heldout, Loop

SIZE = 16
SIGMA, LR = 0.1, 0.05
EVERYONE = range(SIZE)
UNEVEN = (range(0, 2), range(2, 10), range(10, SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers")
    write_llama(path / "tiny")
    (path / "text.txt").write_bytes(b"abcd efgh. " * 400)
    return path


def module(folder):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def fitness(model, active, generation):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(generation))
        return -active.split(model(active.expand(x))).square().mean(dim=(1, 2))

    config = ESConfig(population_size=SIZE, rank=2, optimizer="adam")
    heldout = lambda model: -model(torch.ones(2, 4)).square().mean().item()  # noqa: E731
    return config, lambda: TorchWorker(make, fitness, config, heldout_fn=heldout)


def language(folder):
    from eggroll.llm.backends.build import WorkerFactory
    from eggroll.llm.config import EggrollConfig
    from eggroll.llm.data.examples import Example

    config = EggrollConfig(population_size=SIZE, rank=1, max_tokens=3, prompts_per_generation=2)
    prompts = [Example("What is red?"), Example("Name a fish."), Example("Why?")]
    factory = WorkerFactory(
        str(folder / "tiny"), config, lambda text: float(len(text) % 7), prompts, prompts[:1], dtype="float32"
    )
    return config, factory


def policy(folder, env="CartPole-v1"):
    pytest.importorskip("gymnax")
    from eggroll.rl.config import RLConfig
    from eggroll.rl.kind import KIND

    plan = KIND.plan(
        RLConfig(
            env=env, population_size=SIZE, rank=2, hidden=8, layers=1, max_steps=40, eval_episodes=2, optimizer="adam",
            lr=LR, sigma=SIGMA, episodes=1, members_per_forward=2,
        )
    )  # fmt: skip
    return plan.config, plan.make_worker


def gymnasium_policy(folder):
    pytest.importorskip("gymnasium")
    return policy(folder, "gymnasium/CartPole-v1")


def pretraining(folder, precision="int8"):
    from eggroll.pretrain.config import PretrainOptions
    from eggroll.pretrain.kind import make_worker

    options = PretrainOptions(
        data=str(folder / "text.txt"), hidden=16, n_layers=1, population_size=SIZE, generations=9, tokens=6, context=3,
        noise_table_size=1 << 14, group_size=4, precision=precision, sample_every=0,
    )  # fmt: skip
    return options.es(), lambda: make_worker(options)


def floating_pretraining(folder):
    return pretraining(folder, "fp32")


def recipe(folder):
    from eggroll.recipes import cartpole

    options = cartpole.CartPoleOptions(population_size=SIZE, generations=9, device="cpu")
    return options, lambda: cartpole.worker(options)


WORKERS = {
    "module": module,
    "language model": language,
    "policy": policy,
    "policy on gymnasium": gymnasium_policy,
    "integer pretraining": pretraining,
    "floating pretraining": floating_pretraining,
    "recipe": recipe,
}


@pytest.fixture(scope="module", params=[*WORKERS, "pool"])
def kind(request, folder):
    """The settings, and a factory of workers that all begin alike."""
    if request.param == "pool":
        config, make = module(folder)
        return config, lambda: LocalPool(make, workers=2, population_size=SIZE, range_size=2)
    return WORKERS[request.param](folder)


@pytest.fixture(scope="module")
def worker(kind):
    """One that is only asked, never updated."""
    return kind[1]()


def state(worker):
    return {name: array(value) for name, value in worker.state_tensors().items()}


def array(value):
    """A copy in NumPy."""
    return value.detach().numpy().copy() if isinstance(value, torch.Tensor) else np.array(value)


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def step(config, worker, generation):
    """One generation; the norm of its change."""
    found = worker.evaluate(generation, SIGMA, EVERYONE)
    weights = config.shape(found.fitness)
    return worker.apply(UpdateRecord.make(generation, SIGMA, LR, weights, found.totals))


def test_the_same_range_has_the_same_scores(worker):
    first, second = (worker.evaluate(1, SIGMA, range(2, 8)) for _ in range(2))
    assert isinstance(first, Evaluation)
    assert len(first.fitness) == 6
    assert np.array_equal(first.fitness, second.fitness)
    other = worker.evaluate(2, SIGMA, range(2, 8))
    assert other.fitness.shape == first.fitness.shape


def test_uneven_ranges_add_up_to_the_whole(worker):
    """To the last bits: a batch of another shape may round differently."""
    whole, parts = worker.evaluate(1, SIGMA, EVERYONE), [worker.evaluate(1, SIGMA, members) for members in UNEVEN]
    np.testing.assert_allclose(np.concatenate([part.fitness for part in parts]), whole.fitness, rtol=2e-5, atol=1e-6)
    assert sum(part.tokens for part in parts) == whole.tokens
    for name, value in whole.totals.items():
        np.testing.assert_allclose(sum(part.totals[name] for part in parts), value, rtol=1e-4, atol=1e-3)


def test_evaluation_changes_nothing(worker):
    before = state(worker)
    worker.evaluate(3, SIGMA, range(4))
    worker.heldout(0)
    assert same(state(worker), before)


def test_heldout_is_of_the_center(worker):
    first, second = worker.heldout(2), worker.heldout(2)
    assert isinstance(first, Heldout)
    assert np.isfinite(first.reward)
    assert first.reward == second.reward


def test_the_same_records_give_the_same_weights(kind):
    """In sequence, and from a state in the middle that another worker takes over."""
    config, make = kind
    one, other = make(), make()
    assert same(state(one), state(other)), "all begin alike"
    start = state(one)
    norms = [step(config, one, generation) for generation in range(2)]
    assert all(norm > 0 for norm in norms)
    assert not same(state(one), start)
    middle = one.state_tensors()
    copied = {name: torch.from_numpy(array(value)) for name, value in middle.items()}
    other.load_state_tensors(copied)
    assert same(state(other), state(one)), "a state makes the round trip"
    assert step(config, one, 2) == step(config, other, 2) > 0
    assert same(state(other), state(one))


def test_a_pool_of_two_is_a_pool_of_one(kind):
    """Also when a worker dies on the way."""
    config, make = kind
    config = dataclasses.replace(config, generations=3)
    if isinstance(make(), LocalPool):
        pytest.skip("pools of pools are no use")
    ends = []
    for workers, victim in ((1, None), (2, None), (2, 0)):
        with LocalPool(make, workers=workers, population_size=SIZE, range_size=4, notify=lambda text: None) as pool:

            def stop(metrics, pool=pool, victim=victim):
                if victim is not None and metrics["generation"] == 1:
                    pool.kill(pool.workers()[victim]["number"])
                return False

            Loop(config, pool, stop=stop).go()
            ends.append(state(pool))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])
