"""The centre of a run, alone or as a module with its population: records of updates in, new weights out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.errors import CheckpointError, ConfigError
from eggroll.torch.gradient import es_gradient
from eggroll.torch.noise import Noise
from eggroll.torch.population import Mode, Population
from eggroll.torch.updater import OptimizerFactory, Updater, optimizer_factory

MATRIX_KINDS = ("matrix", "conv", "experts")


class Center:
    """The evolved parameters of a run, where their noise comes from, and their optimizer.

    Two of them that start from the same weights and apply the same records have the same weights, bit for bit on the
    same kind of machine.

    Args:
        parameters: name to parameter, for every parameter of the noise; changed in place by :meth:`apply`.
        noise: the noise that members are drawn from.
        config: the settings of the algorithm.
        factory: makes the optimizer, set to maximise; ``None`` takes the one that ``config.optimizer`` names.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        noise: Noise,
        config: ESConfig,
        factory: OptimizerFactory | None = None,
    ) -> None:
        self.noise, self.config = noise, config
        self.updater = Updater(
            parameters, factory or optimizer_factory(config), rounding=config.rounding, seed=config.seed
        )

    @torch.no_grad()
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
        weights, squares = record.weights, 0.0
        for spec in self.noise.specs:
            gradient = es_gradient(
                self.noise,
                spec,
                weights,
                record.generation,
                antithetic=self.config.antithetic,
                device=self.updater.parameters[spec.name].device,
            )
            squares += self.updater.step(spec.name, gradient, lr=record.lr, generation=record.generation)
            del gradient  # before the next one is made
        return float(squares**0.5)

    def state_tensors(self) -> dict[str, Tensor]:
        """Evolved parameters, masters and optimizer state, flat: what a checkpoint holds."""
        tensors = {f"parameter/{name}": parameter.detach() for name, parameter in self.updater.parameters.items()}
        return tensors | self.updater.state_tensors()

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` gave.

        Raises:
            CheckpointError: a parameter is missing or has another shape.
        """
        problems = []
        for name, parameter in self.updater.parameters.items():
            stored = tensors.get(f"parameter/{name}")
            if stored is None:
                problems.append(f"{name} is missing")
            elif stored.shape != parameter.shape:
                problems.append(f"{name} is {tuple(stored.shape)}, the model has {tuple(parameter.shape)}")
        if problems:
            raise CheckpointError(
                f"the checkpoint does not fit this model: {'; '.join(problems[:3])}"
                f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}"
            )
        for name, parameter in self.updater.parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
        self.updater.load_state_tensors(tensors)


class Replica(Center):
    """The centre of a run as a module, with its population.

    Args:
        model: the module to evolve, in evaluation mode; its parameters are changed in place by :meth:`apply`.
        config: the settings of the algorithm.
        kinds: kinds of parameters that are evolved when ``config.target_modules`` is ``None``.
        factory: makes the optimizer, set to maximise; ``None`` takes the one that ``config.optimizer`` names.
        mode: how members are evaluated (see :class:`Population`).
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
        )
        parameters = {spec.name: self.population.parameter(spec.name) for spec in self.population.specs}
        super().__init__(parameters, self.population.noise, config, factory)
