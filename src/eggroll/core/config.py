"""The settings of the algorithm: frozen, validated, all problems reported at once."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from eggroll.core.arrays import Array
from eggroll.core.check import is_number, numbers, whole
from eggroll.core.fitness import Sampling as Sampling
from eggroll.core.fitness import Shaping as Shaping
from eggroll.core.fitness import ShapingName, shape_fitness, shaping_name
from eggroll.core.noise_spec import NoiseSpec
from eggroll.core.schedules import Schedule, ScheduleName
from eggroll.core.settings import setting, to_json_values
from eggroll.errors import ConfigError

OptimizerName = Literal["sgd", "momentum", "adam", "adamw"]
Rounding = Literal["auto", "master", "stochastic", "nearest"]
QuantizedUpdate = Literal["error_feedback", "nearest", "threshold", "scales"]
ResidualStart = Literal["uniform", "zero"]


@dataclass(frozen=True, kw_only=True)
class ESConfig:
    """What EGGROLL itself needs to know; each kind of training adds its own settings to these.

    Raises:
        ConfigError: one or several settings cannot work; the message lists all of them.
    """

    population_size: int = setting(256, flags=("-p", "--population", "--pop_size"))
    """Members per generation; both signs of an antithetic pair count."""
    rank: int = 8
    """Rank of a matrix's perturbation. 1 loses almost nothing in variance and is the fastest."""
    sigma: float = 0.01
    """Standard deviation of a perturbation's entries."""
    lr: float = 0.001
    """Learning rate; it absorbs 1/sigma: plain SGD is params + lr * es_gradient."""
    generations: int = setting(100, flags=("-g",), resume=True)
    """Number of updates."""
    antithetic: bool = setting(True, hidden=True)
    """Members 2k and 2k+1 share a draw with opposite signs. ``sampling`` overrides this when it is given."""
    sampling: Sampling | None = None
    """``antithetic``, or ``one_sided``: every member has a draw of its own, with a leave-one-out baseline."""
    fitness_shaping: Shaping = setting("centered_rank", runs_code=lambda shaping: ":" in str(shaping))
    """``centered_rank`` (in [-0.5, 0.5], ties share the mean rank), ``normalized`` (z-score) or ``raw``; in Python also
    a function of the scores (:mod:`eggroll.core.fitness`)."""
    group_size: int = 0
    """Consecutive members that are centered together; 0 centers over the whole population."""
    target_modules: tuple[str, ...] | None = None
    """Name patterns of the parameters to evolve; ``None`` evolves all matrices."""
    exclude: tuple[str, ...] = ()
    """Name patterns of parameters that are left alone."""
    elite_k: int = 0
    """Only the best k members contribute; 0 uses all."""
    weight_decay: float = 0.0
    """L2 regularization in the optimizer (decoupled for adamw): a pull towards zero."""
    anchored_weight_decay: float = 0.0
    """The same towards the weights that the run began with (L2-SP), against forgetting; keeps a copy of them."""
    optimizer: OptimizerName = "sgd"
    """Which rule turns the estimate into a step."""
    momentum: float = 0.9
    """Momentum of ``optimizer="momentum"``."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's two decay rates."""
    lr_decay: float = 1.0
    """Factor on lr per generation, with ``lr_schedule="exponential"``."""
    sigma_decay: float = 1.0
    """Factor on sigma per generation, with ``sigma_schedule="exponential"``."""
    lr_schedule: ScheduleName = "exponential"
    """``constant``, ``exponential`` (by ``lr_decay``), ``linear`` or ``cosine`` (towards 0 after the last)."""
    sigma_schedule: ScheduleName = "exponential"
    """The same for sigma; ``linear`` and ``cosine`` fall to a tenth."""
    noise_reuse: int = 1
    """Generations that share the same noise; 1 draws afresh each time."""
    rounding: Rounding = "auto"
    """How updates reach 16-bit weights: fp32 ``master`` copies, ``stochastic`` rounding, or plain ``nearest``
    (loses most small steps). ``auto`` is ``master`` for 16-bit weights; 32-bit weights need none of it."""
    quantized_update: QuantizedUpdate = setting("error_feedback", hidden=True)
    """How updates move the integer codes of quantized weights: ``error_feedback`` keeps what is smaller than one
    quantum for later generations, ``nearest`` rounds each update alone (loses most small steps), ``threshold`` moves
    codes by one where an estimate stands out (see move_threshold; lr and optimizer play no part in it), ``scales``
    leaves the codes alone and perturbs and moves the scales of their groups (sigma and lr are then relative)."""
    residual_decay: float = setting(1.0, hidden=True)
    """What ``error_feedback`` keeps of its residual from one generation to the next; 1 keeps all of it."""
    residual_start: ResidualStart = setting("uniform", hidden=True)
    """What the residual of ``error_feedback`` begins with: ``uniform`` is a random part of a quantum for each weight,
    so that small steps move some codes from the first generation on; ``zero`` lets all wait for half a quantum."""
    residual_generations: int = setting(0, hidden=True)
    """0 stores the residual of ``error_feedback``, 2 bytes per weight; K rebuilds it at every update from the scores of
    the last K generations, which needs no memory but time, ``optimizer="sgd"`` and a residual_decay below 1 (50 and
    0.9 for example)."""
    move_threshold: float = setting(2.5, hidden=True)
    """With ``quantized_update="threshold"``: how many standard deviations from the mean of its weight an entry's step
    must be to move its code."""
    seed: int = 42
    """Seed of everything random."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude", "betas"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        if self.sampling is None:
            object.__setattr__(self, "sampling", "antithetic" if self.antithetic else "one_sided")
        else:
            object.__setattr__(self, "antithetic", self.sampling == "antithetic")
        problems = self.problems()
        if problems:
            raise ConfigError.from_problems(type(self).__name__, problems)

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each; empty if they can work."""
        own_shaping = callable(self.fitness_shaping) or ":" in str(self.fitness_shaping)
        found = [
            *([] if own_shaping else _choices(self, fitness_shaping=ShapingName)),
            *_choices(self, sampling=Sampling, optimizer=OptimizerName, rounding=Rounding),
            *_choices(self, quantized_update=QuantizedUpdate, residual_start=ResidualStart),
            *_choices(self, lr_schedule=ScheduleName, sigma_schedule=ScheduleName),
            *whole(self, population_size=1, rank=1, generations=0, noise_reuse=1, group_size=0, elite_k=0),
            *whole(self, most=None, seed=0),
            *whole(self, residual_generations=0),
            *numbers(self, move_threshold=(0.0, False)),
            *numbers(self, sigma=(0.0, False), lr=(0.0, True), weight_decay=(0.0, True)),
            *numbers(self, anchored_weight_decay=(0.0, True)),
            *numbers(self, lr_decay=(0.0, False), sigma_decay=(0.0, False)),
            *_decay_rates(momentum=(self.momentum,), betas=self.betas),
            *_shares(residual_decay=self.residual_decay),
            *_patterns(target_modules=self.target_modules, exclude=self.exclude),
        ]
        if not (whole(self, population_size=1, group_size=0, elite_k=0) or whole(self, most=None, seed=0)):
            found += self._combinations()
        if not whole(self, residual_generations=0):
            found += self._quantized_combinations()
        return found

    def _quantized_combinations(self) -> list[str]:
        found = []
        if self.quantized_update in ("threshold", "scales") and self.weight_decay:
            found.append(
                f'weight_decay (={self.weight_decay}) has no meaning with quantized_update="{self.quantized_update}", '
                'whose moves do not depend on the weights; use weight_decay=0 or quantized_update="error_feedback"'
            )
        kept = self.residual_generations
        if not kept:
            return found
        given = f"residual_generations (={kept}) rebuilds the residual"
        if self.quantized_update != "error_feedback":
            found.append(
                f'{given} of quantized_update="error_feedback", and {self.quantized_update!r} has none; use '
                "residual_generations=0"
            )
        if self.residual_decay == 1:
            found.append(
                f"{given} from the last {kept} generations, so older ones must be forgotten, and residual_decay (=1) "
                "forgets none; use residual_decay=0.9, or residual_generations=0 to store it"
            )
        if self.optimizer != "sgd" or self.weight_decay:
            other = f'optimizer="{self.optimizer}"' if self.optimizer != "sgd" else f"weight_decay={self.weight_decay}"
            found.append(
                f'{given} from scores, and with {other} a step depends on more than those; use optimizer="sgd" with '
                "weight_decay=0, or residual_generations=0 to store it"
            )
        return found

    def _combinations(self) -> list[str]:
        found = []
        size = self.population_size
        if self.antithetic and size % 2:
            found.append(
                f"population_size (={size}) must be even when antithetic=True; use {size + 1} or antithetic=False"
            )
        if not self.antithetic and size < 2:
            found.append(f"population_size (={size}) must be at least 2: a single score has no baseline")
        if self.group_size and size % self.group_size:
            divisors = [d for d in range(2, size + 1) if size % d == 0]
            near = sorted(sorted(divisors, key=lambda d: abs(d - self.group_size))[:3])
            found.append(f"group_size (={self.group_size}) must divide population_size (={size}); for example {near}")
        if self.group_size == 1:
            found.append("group_size (=1) centers every member on itself; use 0 (the whole population) or at least 2")
        if self.elite_k >= size:
            found.append(f"elite_k (={self.elite_k}) must be below population_size (={size}); use 0 for all members")
        if self.seed >= 2**64:
            found.append(f"seed (={self.seed}) must be below 2**64")
        if self.target_modules is not None and not self.target_modules:
            found.append("target_modules is empty, so nothing would be evolved; use None for all matrices")
        return found

    @property
    def lr_at(self) -> Schedule:
        """The learning rate as a function of the generation."""
        return Schedule(self.lr_schedule, self.lr, self.lr_decay, self.generations)

    @property
    def sigma_at(self) -> Schedule:
        """Sigma as a function of the generation; it never falls to 0, where nothing could be learned."""
        return Schedule(self.sigma_schedule, self.sigma, self.sigma_decay, self.generations, final_fraction=0.1)

    @property
    def noise(self) -> NoiseSpec:
        """Which noise the population has."""
        return NoiseSpec(self.seed, self.rank, self.antithetic, self.noise_reuse)

    def shape(self, fitness: Array) -> Array:
        """The ``(N,)`` float32 weights of the estimate from raw scores, ``(N,)`` or ``(N, Q)``, of any array library.

        See :func:`eggroll.core.fitness.shape_fitness`.
        """
        return shape_fitness(
            fitness,
            method=self.fitness_shaping,
            sampling=self.sampling or "antithetic",
            group_size=self.group_size,
            elite_k=self.elite_k,
        )

    def weight_metrics(self, weights: NDArray[np.float32]) -> dict[str, float]:
        """What the log says about a generation's weights, besides the metrics of its scores."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values; a shaping function is its ``module:name``.

        Raises:
            ConfigError: the shaping function cannot be found again by its name.
        """
        return to_json_values(self) | {"fitness_shaping": shaping_name(self.fitness_shaping)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown key (the message lists near matches), or a setting that cannot work.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        problems = []
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                problems.append(f"unknown setting {key!r}{hint}")
        if problems:
            raise ConfigError.from_problems(cls.__name__, problems)
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ForwardOptions:
    """How much is computed at once."""

    members_per_forward: int | None = setting(None, flags=("--batch-members",), resume=True)
    """Members evaluated together (default: as many as fit comfortably). Results do not depend on it."""


def _decay_rates(**fields: Any) -> list[str]:
    expected = {"momentum": 1, "betas": 2}
    found = []
    for name, rates in fields.items():
        valid = isinstance(rates, tuple) and len(rates) == expected[name]
        if not valid or not all(is_number(rate) and 0 <= rate < 1 for rate in rates):
            what = "two numbers" if expected[name] == 2 else "a number"
            value = rates[0] if expected[name] == 1 else rates
            found.append(f"{name} (={value!r}) must be {what} of at least 0 and below 1")
    return found


def _shares(**fields: Any) -> list[str]:
    return [
        f"{name} (={value!r}) must be a number of at least 0 and at most 1"
        for name, value in fields.items()
        if not (is_number(value) and 0 <= value <= 1)
    ]


def _patterns(**fields: Any) -> list[str]:
    found = []
    for name, patterns in fields.items():
        if isinstance(patterns, str):
            found.append(f"{name} (={patterns!r}) must be a list of name patterns; use [{patterns!r}]")
        elif patterns is not None and not (isinstance(patterns, tuple) and all(_is_pattern(p) for p in patterns)):
            found.append(f"{name} (={patterns!r}) must be a list of name patterns, none of them empty")
    return found


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip(". "))


def _choices(config: Any, **fields: Any) -> list[str]:
    found = []
    for name, literal in fields.items():
        value = getattr(config, name)
        if value not in get_args(literal):
            allowed = ", ".join(get_args(literal))
            near = difflib.get_close_matches(str(value), get_args(literal), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            found.append(f"{name} (={value!r}) must be one of: {allowed}{hint}")
    return found
