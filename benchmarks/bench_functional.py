"""Small networks through the functional API: population forward, whole generation and update, beside plain inference.

    python benchmarks/bench_functional.py [--turns 9] [--threads N] [--device cuda]

Three layers of 256 for 2048 members with 64 rows and with one (a step of reinforcement learning), and generations of a
perceptron 784-256-10 for MNIST: draw, forward, cross entropy, ranks, gradients, update. Plain inference is the same
rows through the unperturbed network. Where all members share a minibatch, plain inference gets a copy for each of them,
and the population multiplies the one minibatch once; the case with rows of their own stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import common
import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch import functional as f

MEASURE = "time of plain inference over the same rows / time of the population's"
MEMBERS, WIDTH, LAYERS = 2048, 256, 3
MNIST = {"layer1.weight": (256, 784), "layer1.bias": (256,), "layer2.weight": (10, 256), "layer2.bias": (10,)}
MEMBERS_PER_FORWARD = 256
SIGMA = 0.05


class Stack:
    """Layers of one width with relu between them."""

    def __init__(self, members: int, batch: int, rank: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, generator=generator, device=device)
        self.params = {f"layer{i}.weight": make(WIDTH, WIDTH) / WIDTH**0.5 for i in range(LAYERS)}
        self.shapes = f.get_weight_shapes(self.params)
        self.perts = f.generate_perturbations(self.shapes, members, rank, SIGMA, f.NoiseKey(0), device=device)
        self.x, self.fitness = make(members, batch, WIDTH), make(members)
        # In the first layer's place: what the source's definition of the update is for a single 256 x 256 layer.
        self.one = {"layer0.weight": self.perts["layer0.weight"]}

    def plain(self) -> Tensor:
        h = self.x.view(-1, WIDTH)
        for weight in self.params.values():
            h = torch.relu(F.linear(h, weight))
        return h

    def population(self) -> Tensor:
        h = self.x
        for key, weight in self.params.items():
            h = torch.relu(f.perturbed_forward(h, weight, None, self.perts, key))
        return h

    def layer(self) -> Tensor:
        return f.perturbed_forward(self.x, self.params["layer0.weight"], None, self.perts, "layer0.weight")

    def gradient(self) -> Any:
        return f.compute_gradients(self.fitness, self.one)


class Perceptron:
    """A generation of the MNIST perceptron."""

    def __init__(self, members: int, batch: int, rank: int, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, generator=generator, device=device)
        self.params = {key: make(shape) / shape[-1] ** 0.5 for key, shape in MNIST.items()}
        self.members, self.batch, self.device = members, batch, device
        self.x = make(batch, 784)
        self.labels = torch.randint(10, (batch,), generator=generator, device=device)
        self.own = self.x.repeat(members, 1, 1)
        self.config = f.EggrollConfig(
            population_size=members,
            rank=rank,
            sigma=SIGMA,
            lr=1e-6,
            members_per_forward=min(MEMBERS_PER_FORWARD, members),
        )
        self.number = 0

    def plain(self) -> Tensor:
        p = self.params
        h = torch.relu(F.linear(self.own.view(-1, 784), p["layer1.weight"], p["layer1.bias"]))
        return F.linear(h, p["layer2.weight"], p["layer2.bias"])

    def forward(self, x: Tensor, p: Mapping[str, Tensor], perts: f.Perturbations) -> Tensor:
        h = torch.relu(f.perturbed_forward(x, p["layer1.weight"], p["layer1.bias"], perts, "layer1.weight"))
        return f.perturbed_forward(h, p["layer2.weight"], p["layer2.bias"], perts, "layer2.weight")

    def generation(self, *, shared: bool) -> None:
        first = 0

        def fitness(params: Mapping[str, Tensor], perts: f.Perturbations) -> Tensor:
            nonlocal first
            members = len(perts["layer1.weight"]["U"])
            x = self.x.unsqueeze(0) if shared else self.own[first : first + members]
            first += members
            logits = self.forward(x, params, perts)
            loss = F.cross_entropy(logits.flatten(0, 1), self.labels.repeat(members), reduction="none")
            return -loss.view(members, -1).mean(1)

        self.number += 1
        f.eggroll_step(self.params, fitness, self.config, self.number)


def check(stack: Stack) -> None:
    """Some members against their materialised weights, before anything is timed."""
    got = stack.population().view(*stack.x.shape[:2], WIDTH)
    for p in (0, stack.x.shape[0] - 1):
        h = stack.x[p]
        for key, weight in stack.params.items():
            u, v = stack.perts[key]["U"][p], stack.perts[key]["V"][p]
            h = torch.relu(F.linear(h, weight + u.T @ v))
        torch.testing.assert_close(got[p], h, rtol=1e-3, atol=1e-4)


def timed(calls: Mapping[str, Callable[[], Any]], args: Any, inner: int = 1) -> common.Times:
    """Seconds of each call in turns; of short ones, the mean of ``inner`` calls."""

    def one(call: Callable[[], Any]) -> float:
        return common.seconds(lambda: [call() for _ in range(inner)], args.device) / inner

    return common.alternate({name: partial(one, call) for name, call in calls.items()}, turns=args.turns)


def main() -> None:
    args = common.begin(common.parser(__doc__, turns=9, model=False))
    members = 64 if args.quick else MEMBERS
    rows = []
    with torch.no_grad():
        for rank in (1,) if args.quick else (1, 4, 8):
            for batch, target in ((64, 0.90), (1, 0.50)):
                stack = Stack(members, batch, rank, args.device)
                check(stack)
                calls = {"plain": stack.plain, "population": stack.population}
                if batch == 64:
                    calls |= {"layer": stack.layer, "update": stack.gradient}
                times = timed(calls, args, inner=1 if batch == 64 else 10)
                case = f"forward, {members} members x {batch}, {LAYERS} x {WIDTH}, rank {rank}"
                two = {name: times[name] for name in ("plain", "population")}
                figure = common.ratio(two, "plain", "population")
                rows.append(common.row(case, figure, target=target if rank == 1 else None, seconds=two))
                common.say(rows[-1])
                if batch == 64:
                    two = {name: times[name] for name in ("layer", "update")}
                    case = f"update / forward of one layer, {members} members x {batch}, rank {rank}"
                    figure = common.ratio(two, "update", "layer")
                    target_row = 0.05 if rank == 1 else None
                    rows.append(common.row(case, figure, target=target_row, lower_is_better=True, seconds=two))
                    common.say(rows[-1])
        for batch in (8,) if args.quick else (64, 16):
            perceptron = Perceptron(members, batch, 1, args.device)
            calls = {
                "plain": perceptron.plain,
                "shared": partial(perceptron.generation, shared=True),
                "own rows": partial(perceptron.generation, shared=False),
            }
            times = timed(calls, args)
            for name, words in (("shared", "one minibatch for all"), ("own rows", "rows of their own")):
                two = {key: times[key] for key in ("plain", name)}
                case = f"MNIST generation, {members} members x {batch}, {words}"
                rows.append(common.row(case, common.ratio(two, "plain", name), target=0.8, seconds=two))
                common.say(rows[-1])
    common.finish("functional", MEASURE, rows, args, members=members, members_per_forward=MEMBERS_PER_FORWARD)


if __name__ == "__main__":
    main()
