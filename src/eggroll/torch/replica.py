"""The center of a run, alone or as a module with its population: scores or records of updates in, new weights out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.core.select import ParameterSpec
from eggroll.errors import CheckpointError, ConfigError
from eggroll.torch.active import Active
from eggroll.torch.anchor import Anchor
from eggroll.torch.gradient import es_gradient
from eggroll.torch.noise import Noise
from eggroll.torch.population import Mode, Population
from eggroll.torch.quantized.past import Past
from eggroll.torch.quantized.scales import clipped
from eggroll.torch.quantized.tensor import grid_of, stored
from eggroll.torch.quantized.update import GridRule, Steps
from eggroll.torch.scores import checked_scores
from eggroll.torch.updater import OptimizerFactory, Updater, optimizer_factory

MATRIX_KINDS = ("matrix", "conv", "experts")

ScoreFn = Callable[[nn.Module, Active], Any]
"""``(model, active) -> (members,)`` or ``(members, prompts)`` scores, higher is better."""


class Center:
    """The evolved parameters of a run, where their noise comes from, and their optimizer.

    Two of them that start from the same weights and apply the same records have the same weights, bit for bit on the
    same kind of machine.

    Args:
        parameters: name to parameter, for every parameter of the noise; changed in place by :meth:`apply`.
        noise: the noise that members are drawn from.
        config: the settings of the algorithm.
        factory: makes the optimizer, set to maximize; ``None`` takes the one that ``config.optimizer`` names.

    Attributes:
        generation: finished updates, and so the generation that is next. It is no part of :meth:`state_tensors`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        noise: Noise,
        config: ESConfig,
        factory: OptimizerFactory | None = None,
    ) -> None:
        self.noise, self.config = noise, config
        self.generation = 0
        self._past: Past | None = None
        if config.residual_generations and any(grid_of(parameter) is not None for parameter in parameters.values()):
            if factory is not None:
                raise ConfigError(
                    f"residual_generations (={config.residual_generations}) rebuilds the residual from scores, which "
                    'only the step of optimizer="sgd" depends on alone; give no optimizer of your own, or use '
                    "residual_generations=0 to store it"
                )
            self._past = Past(config.residual_generations, [spec.name for spec in noise.specs])
        strength, decoupled = config.anchored_weight_decay, config.optimizer == "adamw" and factory is None
        anchor = Anchor(parameters, strength, decoupled=decoupled) if strength else None
        self.updater = Updater(
            parameters,
            factory or optimizer_factory(config),
            rounding=config.rounding,
            seed=config.seed,
            grid_rule=GridRule.of(config),
            weight_decay=config.weight_decay != 0 or factory is not None,
            past=None if self._past is None else self._steps_of,
            anchor=anchor,
            plain=config.optimizer if factory is None and config.weight_decay == 0 else None,
        )
        self._own_factory = factory is not None

    def _steps_of(self, name: str) -> Steps:
        """Gives a parameter's steps of the generations that are kept, each in the same memory."""
        spec = next(spec for spec in self.noise.specs if spec.name == name)

        def steps() -> Iterator[tuple[int, Tensor]]:
            assert self._past is not None
            memory = torch.empty(spec.estimate_shape, dtype=torch.float32, device=self.updater.parameters[name].device)
            for generation, weights, lr in self._past.of(name):
                yield generation, self._gradient(spec, weights, generation, memory).mul_(lr)

        return steps

    def _gradient(
        self, spec: ParameterSpec, weights: NDArray[np.float32], generation: int, out: Tensor | None = None
    ) -> Tensor:
        device = self.updater.parameters[spec.name].device
        if spec.scale_groups:
            weights = clipped(weights)
        return es_gradient(
            self.noise, spec, weights, generation, antithetic=self.config.antithetic, device=device, out=out
        )

    def _room(self, spec: ParameterSpec, memory: dict[torch.device, Tensor]) -> Tensor | None:
        """Where an estimate is written during one update: each in the same memory, as new memory costs a pass over it.

        ``None`` with an optimizer that is not ours, which may keep what it is given.
        """
        if self._own_factory:
            return None
        device, size = self.updater.parameters[spec.name].device, math.prod(spec.estimate_shape)
        if device not in memory:
            sizes = (math.prod(s.estimate_shape) for s in self.noise.specs)
            memory[device] = torch.empty(max(sizes), dtype=torch.float32, device=device)
        return memory[device][:size].view(spec.estimate_shape)

    def apply(self, record: UpdateRecord) -> float:
        """Rebuild one update from its record and take it. Returns the norm of the change of all parameters.

        Raises:
            ConfigError: the record has another number of members than the population.
        """
        if len(record.shaped_fitness) != self.config.population_size:
            raise ConfigError(
                f"the record of generation {record.generation} has {len(record.shaped_fitness)} members, the "
                f"population has {self.config.population_size}"
            )
        return self.update(record.generation, record.weights, record.lr)

    @torch.no_grad()
    def update(self, generation: int, weights: NDArray[np.float32], lr: float | Mapping[str, float]) -> float:
        """Take the step of ``es_gradient = (1/N) sum_p s_p E_p``. Returns the norm of the change of all parameters.

        Args:
            generation: whose noise it is.
            weights: ``(N,)`` shaped fitness ``s_p``.
            lr: learning rate, one for all parameters or one for each by name.
        """
        squares = 0.0
        memory: dict[torch.device, Tensor] = {}
        for spec in self.noise.specs:
            gradient = self._gradient(spec, weights, generation, self._room(spec, memory))
            own = lr[spec.name] if isinstance(lr, Mapping) else lr
            squares += self.updater.step(spec.name, gradient, lr=own, generation=generation)
            del gradient  # before the next one is made
        self.updater.turning.finish()
        if self._past is not None:
            self._past.add(generation, weights, lr)
        self.generation = generation + 1
        return float(squares**0.5)

    def state_tensors(self) -> dict[str, Tensor]:
        """Evolved parameters, masters and optimizer state, flat: what a checkpoint holds."""
        tensors = {f"parameter/{name}": stored(parameter) for name, parameter in self.updater.parameters.items()}
        if self._past is not None:
            tensors |= {f"past/{key}": value for key, value in self._past.state().items()}
        return tensors | self.updater.state_tensors()

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` gave.

        Raises:
            CheckpointError: a parameter is missing or has another shape.
        """
        problems = []
        for name, parameter in self.updater.parameters.items():
            saved, held = tensors.get(f"parameter/{name}"), stored(parameter)
            if saved is None:
                problems.append(f"{name} is missing")
            elif saved.shape != held.shape or saved.is_floating_point() != held.is_floating_point():
                problems.append(f"{name} is {_form(saved)}, the model has {_form(held)}")
        if problems:
            raise CheckpointError(
                f"the checkpoint does not fit this model: {'; '.join(problems[:3])}"
                f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}"
            )
        for name, parameter in self.updater.parameters.items():
            stored(parameter).copy_(tensors[f"parameter/{name}"])
        self.updater.load_state_tensors(tensors)
        if self._past is not None:
            past = {key.removeprefix("past/"): value for key, value in tensors.items() if key.startswith("past/")}
            self._past.load_state(past)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} codes"


class Replica(Center):
    """The center of a run as a module, with its population: ask, evaluate, tell.

        >>> config = ESConfig(population_size=64, rank=1, sigma=0.1, lr=0.1)
        >>> replica = Replica(nn.Linear(3, 1), config, kinds=("matrix", "vector"))
        >>> x, y = torch.randn(32, 3), torch.randn(32, 1)
        >>> def fitness(model, active):
        ...     return -(active.split(model(active.expand(x))) - y).square().mean(dim=(1, 2))  # (members,)
        >>> for _ in range(100):
        ...     scores = replica.step(fitness)  # (64,)

    A step is :meth:`evaluate`, then :meth:`tell`. With scores from elsewhere::

        with replica.ask() as active, torch.no_grad():
            y = active.split(model(active.expand(x)))  # (population_size, batch, ...)
        replica.tell(replica.generation, judge(y))

    Args:
        model: the module to evolve, in evaluation mode; updates change its parameters in place.
        config: the settings of the algorithm.
        kinds: kinds of parameters that are evolved when ``config.target_modules`` is ``None``.
        factory: makes the optimizer, set to maximize; ``None`` takes the one that ``config.optimizer`` names.
        mode: how members are evaluated (see :class:`Population`).

    Attributes:
        generation: finished updates, and so the generation that is next; set it after :meth:`load_state_tensors`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ESConfig,
        *,
        kinds: Sequence[str] = MATRIX_KINDS,
        factory: OptimizerFactory | None = None,
        mode: Mode = "auto",
    ) -> None:
        self.model = model
        self.population = Population(
            model,
            population_size=config.population_size,
            sigma=config.sigma,
            rank=config.rank,
            seed=config.seed,
            antithetic=config.antithetic,
            noise_reuse=config.noise_reuse,
            target_modules=config.target_modules,
            exclude=config.exclude,
            kinds=kinds,
            mode=mode,
            scales=config.quantized_update == "scales",
        )
        parameters = {spec.name: self.population.parameter(spec.name) for spec in self.population.specs}
        super().__init__(parameters, self.population.noise, config, factory)

    def ask(self, members: Sequence[int] | None = None) -> AbstractContextManager[Active]:
        """A block in which the model is the coming generation's ``members`` (consecutive; all by default)."""
        sigma = self.config.sigma_at(self.generation)
        return self.population.perturbed(self.generation, members, sigma=sigma)

    def evaluate(
        self,
        score_fn: ScoreFn,
        *,
        generation: int | None = None,
        sigma: float | None = None,
        members: range | None = None,
        members_per_forward: int | None = None,
    ) -> Tensor:
        """Scores of a generation's members; the center stays as it is.

        Args:
            score_fn: called with the model while it is a part of the population, and with that part: its ``expand``
                and ``split`` put members into a batch and take them out again, ``members`` counts them. Returns
                ``(members,)`` or ``(members, prompts)`` scores, a tensor or an array; higher is better.
            generation: the coming one by default.
            sigma: that of the schedule by default.
            members: consecutive members; all by default.
            members_per_forward: how many are evaluated at once; all by default. Results do not depend on it, memory and
                speed do.

        Returns:
            ``(len(members),)`` or ``(len(members), prompts)`` raw scores.

        Raises:
            RewardError: ``score_fn`` returned something else than a score for each member.
        """
        generation = self.generation if generation is None else generation
        return self.population.scores(
            lambda active: score_fn(self.model, active),
            generation,
            sigma=self.config.sigma_at(generation) if sigma is None else sigma,
            members=members,
            members_per_forward=members_per_forward,
        )

    def tell(self, generation: int, scores: Any) -> float:
        """Update from raw scores: shaped as the config says, taken with the schedule's learning rate.

        Args:
            generation: whose members have these scores.
            scores: ``(N,)``, or ``(N, prompts)``: one for each member and prompt; a tensor or an array, higher is
                better. NaN and infinities count as the worst of the generation, with a warning.

        Returns:
            The norm of the change of all parameters.

        Raises:
            RewardError: another number of scores than members.
        """
        table = checked_scores(
            scores,
            self.config.population_size,
            "tell needs",
            "it got",
            "Concatenate the scores of parts of a population",
        )
        config = self.config
        weights = config.shape(table.double().cpu().numpy())
        sigma, lr = config.sigma_at(generation), config.lr_at(generation)
        return self.apply(UpdateRecord.make(generation, sigma, lr, weights))

    def step(self, score_fn: ScoreFn, *, members_per_forward: int | None = None) -> Tensor:
        """One generation: :meth:`evaluate` all members, :meth:`tell` their scores. Returns the raw scores.

        An exception in ``score_fn`` leaves everything as it was.
        """
        scores = self.evaluate(score_fn, members_per_forward=members_per_forward)
        self.tell(self.generation, scores)
        return scores
