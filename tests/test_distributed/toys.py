"""A small network to evolve on a pool, with fitness functions that are slow, wrong or deadly on request."""

import os
import time
from pathlib import Path

import numpy as np

from eggroll.core.config import ESConfig
from eggroll.errors import MemoryBudgetError, RewardError
from eggroll.loop import Evaluation, Heldout


def config(**settings):
    return ESConfig(**{"population_size": 32, "rank": 2, "sigma": 0.1, "lr": 0.3, "generations": 10, **settings})


def make_model(width=16):
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def data(generation=0):
    import torch

    generator = torch.Generator().manual_seed(generation)
    x = torch.randn(8, 4, generator=generator)
    return x, torch.stack([x.sum(1), x.prod(1)], 1)


def fitness(model, active, generation):
    x, target = data(generation)
    return -(active.split(model(active.expand(x))) - target).square().mean(dim=(1, 2))


def heldout(model):
    import torch

    x, target = data(999)
    with torch.no_grad():
        return -float((model(x) - target).square().mean())


def factory(settings, *, width=16, sleep=0.0, log=None):
    """A worker whose ranges take ``sleep`` seconds; each leaves a line ``generation pid`` in the file ``log``."""

    def scored(model, active, generation):
        if log is not None:
            with open(log, "a") as file:
                file.write(f"{generation} {os.getpid()}\n")
        time.sleep(sleep)
        return fitness(model, active, generation)

    def make():
        from eggroll.distributed import TorchWorker

        return TorchWorker(lambda: make_model(width), scored, settings, heldout_fn=heldout)

    return make


def once_without_room(marker):
    """The first process to be made has no room for the model."""

    def make():
        if first_here(marker):
            raise MemoryBudgetError("the model needs 14 GB, 2 GB are free")
        return NumpyWorker()

    return make


def without_room():
    raise MemoryBudgetError("the model needs 14 GB, 2 GB are free")


class NumpyWorker:
    """A vector that is pulled towards another one. Its process starts in a second, because it loads no PyTorch."""

    def __init__(self, size=6, *, sleep=0.0, log=None, tamper=None):
        self.theta = np.zeros(size, dtype=np.float32)
        self.target = np.linspace(-1, 1, size, dtype=np.float32)
        self.sleep, self.log, self.tamper = sleep, log, tamper

    def noise(self, generation, member):
        draw = np.random.default_rng((generation, member // 2)).standard_normal(self.theta.size).astype(np.float32)
        return draw if member % 2 == 0 else -draw

    def evaluate(self, generation, sigma, members):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{generation} {os.getpid()}\n")
        time.sleep(self.sleep)
        found = [self.theta + np.float32(sigma) * self.noise(generation, member) for member in members]
        fitness = np.array([-np.square(one - self.target).sum() for one in found])
        samples = [{"member": 0}] if members.start == 0 else []
        return Evaluation(fitness, {"draw_s": 0.5, "share": float(members.start)}, tokens=len(members), samples=samples)

    def heldout(self, generation):
        return Heldout(-float(np.square(self.theta - self.target).sum()), [{"centre": True}], {"more": 1.0})

    def apply(self, record):
        before = self.theta.copy()
        for member, weight in enumerate(record.weights):
            self.theta += np.float32(record.lr) / len(record.weights) * weight * self.noise(record.generation, member)
        if self.tamper and record.generation == self.tamper[1] and not first_here(self.tamper[0]):
            self.theta += 1
        return float(np.linalg.norm(self.theta - before))

    def state_tensors(self):
        return {"parameter/theta": self.theta}

    def load_state_tensors(self, tensors):
        self.theta = np.asarray(tensors["parameter/theta"]).copy()


def first_here(marker):
    """Whether no other process has been here before."""
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Deadly(NumpyWorker):
    """Dies whenever it is to score anything."""

    def evaluate(self, generation, sigma, members):
        os.write(2, b"the last words\n")
        os._exit(3)


class Wrong(NumpyWorker):
    def evaluate(self, generation, sigma, members):
        raise RewardError("the reward is wrong")


class Buggy(NumpyWorker):
    def evaluate(self, generation, sigma, members):
        return {}["nothing"]


class Miscounting(NumpyWorker):
    def evaluate(self, generation, sigma, members):
        return Evaluation(np.zeros(3))
