"""``EGGROLL``: a ``torch.optim.Optimizer``-shaped trainer for a module and a fitness function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.core.fitness import Shaping, shape_fitness
from eggroll.core.select import KINDS, LOW_RANK_KINDS
from eggroll.errors import CheckpointError, ConfigError, RewardError
from eggroll.torch.active import Active
from eggroll.torch.population import Population
from eggroll.torch.replica import Replica
from eggroll.torch.updater import OptimizerFactory

FitnessFn = Callable[[nn.Module], Any]


class EGGROLL(torch.optim.Optimizer):
    """Evolves a module's parameters so that ``fitness_fn`` rises. No gradient is ever computed.

        >>> opt = EGGROLL(model.parameters(), model=model, fitness_fn=fitness, population_size=256, sigma=0.05)
        >>> for _ in range(100):
        ...     mean_fitness = opt.step()

    One step evaluates ``population_size`` members and takes ``W += lr * (1/N) sum_p s_p E_p`` (EGGROLL section 4), with
    ``E_p = A_p B_p^T / sqrt(rank)`` for matrices, embeddings and convolution kernels and dense N(0, 1) for everything
    else. Learning-rate schedulers of ``torch.optim`` work on it, and ``opt.sigma`` may be changed between steps.

    A step with the default ``batched=False`` calls ``fitness_fn(model) -> float`` once for each member, with the
    member's weights in the model: anything that can be done with a module can be done there. With ``batched=True`` it
    is called once, while the model is the whole population: inputs and outputs hold the members in their leading
    dimension, which :meth:`expand` and :meth:`split` do::

        def fitness(model):
            y = opt.split(model(opt.expand(x)))           # (population_size, batch, ...)
            return -(y - target).square().mean(dim=(1, 2))  # (population_size,)

    ``noise_reuse`` says how many evaluations share a draw, with alternating signs:

    - ``0`` (or 1): every member has a draw of its own (ours: ``sampling="one_sided"``), and its weight is taken against
      the mean of the other members (leave-one-out baseline; for z-scores and ranks the mean of all, which is the same
      up to the factor ``N / (N - 1)``);
    - ``2``: antithetic pairs, members ``2k`` and ``2k + 1`` with ``+E`` and ``-E`` (ours: ``sampling="antithetic"``);
    - ``k``: members ``k d`` to ``k d + k - 1`` are ``+E_d, -E_d, +E_d, ...``, which averages out a noisy fitness.

    (The setting of that name of the other parts of eggroll is for generations that share their noise; here every step
    draws afresh.)

    Args:
        params: parameters of ``model``, or groups of them with learning rates of their own, as for any optimizer.
        model: the module, in evaluation mode.
        fitness_fn: the score, higher is better. NaN counts as the worst of the generation, with a warning.
        population_size: evaluations per step.
        learning_rate: absorbs 1/sigma (docs/scale-conventions.md).
        sigma: standard deviation of a perturbation's entries.
        rank: rank of the perturbations of matrices.
        noise_reuse: see above.
        group_size: consecutive members whose fitness is normalized together; 0 means all.
        freeze_nonlora: leave everything but matrices, embeddings and kernels alone.
        seed: seed of the noise.
        batched: see above.
        batch_members: with ``batched``, call ``fitness_fn`` for so many members at a time (it returns one score for
            each of them) instead of once; results do not depend on it, memory and speed do.
        fitness_shaping: ``normalized`` (z-scores within the group), ``centered_rank`` or ``raw``.
        optimizer: turns the estimate into a step: ``sgd``, ``momentum``, ``adam``, ``adamw``, or a function that makes
            a ``torch.optim`` optimizer (with ``maximize=True``) of a list of tensors.
        weight_decay: of that optimizer.

    Raises:
        ConfigError: settings that cannot work, or parameters that are not the model's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        model: nn.Module,
        fitness_fn: FitnessFn,
        population_size: int = 256,
        learning_rate: float = 0.01,
        sigma: float = 0.1,
        rank: int = 1,
        noise_reuse: int = 0,
        group_size: int = 0,
        freeze_nonlora: bool = False,
        seed: int = 42,
        batched: bool = False,
        batch_members: int | None = None,
        fitness_shaping: Shaping = "normalized",
        optimizer: str | OptimizerFactory = "sgd",
        weight_decay: float = 0.0,
    ) -> None:
        self.share = _share(population_size, noise_reuse)
        named = optimizer if isinstance(optimizer, str) else "sgd"
        config = ESConfig(
            population_size=population_size, rank=rank, sigma=sigma, lr=learning_rate, seed=seed, group_size=group_size,
            antithetic=self.share == 2, fitness_shaping=fitness_shaping, optimizer=named, weight_decay=weight_decay,  # type: ignore[arg-type]
        )  # fmt: skip
        if batch_members is not None and (not batched or batch_members < 1 or population_size % batch_members):
            raise ConfigError(
                f"batch_members (={batch_members}) must divide population_size (={population_size}) and needs "
                "batched=True; use None to evaluate all members at once"
            )
        super().__init__(params, {"lr": learning_rate})
        self.model, self.fitness_fn, self.config = model, fitness_fn, config
        self.sigma = sigma
        self.batched, self.batch_members = batched, batch_members or population_size
        self.fitness: NDArray[np.float64] | None = None
        """Raw scores of the last step, ``(population_size,)``."""
        self._group_of = _groups_of(model, self.param_groups)
        # The replica's members are what is evaluated, counted once, however often it is.
        members = dataclasses.replace(
            config,
            population_size=population_size if self.share == 1 else 2 * (population_size // self.share),
            sampling="one_sided" if self.share == 1 else "antithetic",
            group_size=0,
            exclude=tuple(name for name, _ in model.named_parameters() if name not in self._group_of),
        )
        self.replica = Replica(
            model,
            members,
            kinds=LOW_RANK_KINDS if freeze_nonlora else KINDS,
            factory=None if isinstance(optimizer, str) else optimizer,
        )
        self._active: Active | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> float:  # type: ignore[override]
        """One generation: evaluate all members, update the parameters in place. Returns the mean fitness.

        An exception in ``fitness_fn`` leaves the model and this object as they were.

        Raises:
            ConfigError: a closure is given; the score is ``fitness_fn``'s.
            RewardError: ``fitness_fn`` returned something else than what it should.
        """
        if closure is not None:
            raise ConfigError("step() takes no closure: members are scored by fitness_fn, and there is no gradient")
        self.population.prepare(self.generation)
        fitness = self._evaluate_batched() if self.batched else self._evaluate_one_by_one()
        rates = {name: float(self.param_groups[group]["lr"]) for name, group in self._group_of.items()}
        self.replica.update(self.generation, self._weights(fitness), rates)
        self.fitness = fitness
        finite = fitness[np.isfinite(fitness)]
        return float(finite.mean()) if finite.size else float("nan")

    @property
    def population(self) -> Population:
        """The members: each one once, however many evaluations share it."""
        return self.replica.population

    @property
    def generation(self) -> int:
        """Steps done."""
        return self.replica.generation

    def _weights(self, fitness: NDArray[np.float64]) -> NDArray[np.float32]:
        """The members' weights: those of evaluations that share a member add up, the mean is over all evaluations."""
        size, members = len(fitness), self.population.population_size
        shaped = shape_fitness(
            fitness,
            method=self.config.fitness_shaping,
            sampling="one_sided" if self.share == 1 else "antithetic",
            group_size=self.config.group_size,
            group_std=True,
        )
        weights = np.zeros(members, dtype=np.float64)
        np.add.at(weights, self._index(0, size), shaped.astype(np.float64))
        return (weights * (members / size)).astype(np.float32)

    def expand(self, x: Tensor) -> Tensor:
        """Within a batched ``fitness_fn``: a batch for every member, ``(B, ...)`` to ``(P * B, ...)``."""
        return self._running().expand(x)

    def split(self, y: Tensor) -> Tensor:
        """Within a batched ``fitness_fn``: ``(P * B, ...)`` to ``(P, B, ...)``."""
        return self._running().split(y)

    def _running(self) -> Active:
        if self._active is None:
            raise ConfigError("expand and split are for use inside fitness_fn while a step with batched=True runs it")
        return self._active

    def _index(self, first: int, count: int) -> NDArray[np.int64]:
        """Which member of the population the evaluations ``first`` to ``first + count`` are of."""
        evaluation = np.arange(first, first + count)
        if self.share == 1:
            return evaluation
        return 2 * (evaluation // self.share) + (evaluation % self.share) % 2

    def _evaluate_one_by_one(self) -> NDArray[np.float64]:
        """Each member's weights are made, so that the model is a plain one while ``fitness_fn`` has it."""
        population, fitness = self.population, np.empty(self.config.population_size, dtype=np.float64)
        for evaluation, member in enumerate(self._index(0, len(fitness)).tolist()):
            with population.member(self.generation, member, sigma=self.sigma, materialize=True) as model:
                fitness[evaluation] = _score(self.fitness_fn(model))
        return fitness

    def _evaluate_batched(self) -> NDArray[np.float64]:
        population, parts = self.population, []
        for first in range(0, self.config.population_size, self.batch_members):
            index = self._index(first, self.batch_members)
            members = range(int(index.min()), int(index.max()) + 1)
            population.check(members)
            context = population.context(self.batch_members if self.batch_members > 1 else None)
            values = population.values(self.generation, index.tolist(), context, sigma=self.sigma)
            with population.standing_in(Active(population, values, context, self.batch_members)) as active:
                self._active = active
                try:
                    scores = self.fitness_fn(self.model)
                finally:
                    self._active = None
            parts.append(_scores(scores, self.batch_members))
        return np.concatenate(parts)

    def _settings(self) -> dict[str, Any]:
        """What a run must keep to go on as it was; learning rates and sigma may change."""
        settings = {key: value for key, value in self.config.to_dict().items() if key not in ("lr", "sigma")}
        return {**settings, "noise_reuse": self.share, "parameters": [spec.name for spec in self.population.specs]}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only when the optimizer is made: the population is made of the groups that it has then.

        Raises:
            ConfigError: later.
        """
        if hasattr(self, "replica"):
            raise ConfigError("parameters cannot be added to an EGGROLL that is made; make a new one with all of them")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Learning rates, sigma, generation and the inner optimizer's state; with the model's own, all of a run."""
        own = {
            "generation": self.generation,
            "sigma": self.sigma,
            "settings": self._settings(),
            "tensors": self.replica.updater.state_tensors(),
        }
        return {**super().state_dict(), "eggroll": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; load the model's own state beside it.

        Raises:
            CheckpointError: it is the state of another kind of optimizer, or of one with other settings.
        """
        if "eggroll" not in state_dict:
            raise CheckpointError(f"this is no state of EGGROLL: it has the keys {sorted(state_dict)}, not 'eggroll'")
        own = state_dict["eggroll"]
        mine, theirs = self._settings(), own["settings"]
        changed = [f"{key}={theirs.get(key)!r} (here {mine[key]!r})" for key in mine if theirs.get(key) != mine[key]]
        if changed:
            raise CheckpointError(
                f"the state is of an EGGROLL with other settings, and would not go on as it was: {'; '.join(changed)}"
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "eggroll"})
        self.replica.updater.load_state_tensors(own["tensors"])
        self.replica.generation, self.sigma = own["generation"], own["sigma"]


def _share(population_size: int, noise_reuse: int) -> int:
    """Evaluations that share a draw."""
    if isinstance(noise_reuse, bool) or not isinstance(noise_reuse, int) or noise_reuse < 0:
        raise ConfigError(
            f"noise_reuse (={noise_reuse!r}) must be 0 (a draw for every member), 2 (antithetic pairs) or the number "
            "of evaluations that share a draw"
        )
    share = max(noise_reuse, 1)
    if isinstance(population_size, int) and population_size % share:
        fitting = population_size + share - population_size % share
        raise ConfigError(
            f"population_size (={population_size}) must be a multiple of noise_reuse (={noise_reuse}), the evaluations "
            f"that share a draw; use {fitting}, or noise_reuse=0 for a draw of its own for every member"
        )
    return share


def _groups_of(model: nn.Module, groups: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Names of the parameters in groups, and which group each is in."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise ConfigError(
                    f"params holds a tensor of shape {tuple(parameter.shape)} that is no parameter of model; pass "
                    "model.parameters(), or some of them, and the same model"
                )
            found[names[id(parameter)]] = number
    return found


def _score(score: Any) -> float:
    try:
        return float(score.item() if isinstance(score, np.ndarray) else score)
    except OverflowError:
        raise RewardError("fitness_fn(model) returned a number that is too large for a float") from None
    except (TypeError, ValueError, RuntimeError):
        shape = f"a tensor of shape {tuple(score.shape)}" if isinstance(score, Tensor) else repr(score)
        raise RewardError(
            f"fitness_fn(model) must return one number, it returned {shape}. To score all members in one call, "
            "use batched=True"
        ) from None


def _scores(scores: Any, members: int) -> NDArray[np.float64]:
    values = scores.detach().double().cpu().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
    if values.shape != (members,) or values.dtype.kind not in "fiub":
        raise RewardError(
            f"fitness_fn(model) must return {members} numbers with batched=True, one for each member; it returned "
            f"{values.dtype} {values.shape}. Inside it, opt.split(y) gives (members, batch, ...)"
        )
    return values.astype(np.float64)
