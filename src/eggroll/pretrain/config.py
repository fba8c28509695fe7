"""The settings of pretraining: ``PretrainOptions`` of a run, ``PretrainConfig`` of the algorithm."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eggroll.core.check import is_number, numbers, whole
from eggroll.core.config import ESConfig
from eggroll.core.schedules import Schedule
from eggroll.core.settings import setting, to_json_values
from eggroll.distributed.options import WorkerOptions
from eggroll.errors import ConfigError
from eggroll.pretrain.engines.base import Backend
from eggroll.pretrain.model.fixed_point import ONE
from eggroll.pretrain.model.noise import DEFAULT_TABLE_SIZE, Noise, NoiseKind
from eggroll.pretrain.model.shape import ModelShape
from eggroll.pretrain.update import Shaping, alpha_at, shape_pairs
from eggroll.run.options import RunOptions

Precision = Literal["int8", "fp32", "bf16"]
AlphaSchedule = Literal["hyperbolic", "exponential"]

LEAST_ALPHA = 1e-9


def _is_integer(options: PretrainOptions) -> bool:
    """In floating point the device and the batch change the last bits."""
    return options.precision == "int8"


def _has_open_end(options: PretrainOptions) -> bool:
    """Whether no schedule ends with the last generation."""
    return options.precision == "int8" and options.alpha_schedule != "exponential"


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """What a member reads."""

    tokens: int = 16
    """Bytes of a window that a member is scored on. With short windows the same time is enough for more members."""
    context: int = 16
    """Bytes before the window that the model itself reads first: a member begins with the state after them."""


@dataclass(frozen=True, kw_only=True)
class IntegerUpdateOptions:
    """How scores become steps of the integer weights."""

    alpha_schedule: AlphaSchedule = "hyperbolic"
    """hyperbolic: alpha / (alpha_decay t + 1), as in the paper; exponential: from alpha to alpha_final."""
    alpha_decay: float = 0.015
    """The 0.015 of the paper's 1 / (0.015 t + 1)."""
    alpha_final: float = 0.02
    """Share in the last generation, with the exponential schedule."""
    fitness: Shaping = "sign"
    """sign of the difference within a pair, or the difference normalized."""
    sign_of_noise: bool = False
    """Use the signs of the noise alone in the update."""
    momentum_shift: int = 0
    """k > 0 tests an accumulator that loses 2^-k of itself a generation instead of the update's sum alone."""


@dataclass(frozen=True)
class Alpha(Schedule):
    """The share of weights that moves, as a function of the generation; the paper's schedule is not one of the loop's.

    ``decay`` is the 0.015 of ``start / (0.015 t + 1)``.
    """

    hyperbolic: bool = True

    def __call__(self, generation: int) -> float:
        """The share in a generation."""
        if self.hyperbolic:
            return alpha_at(generation, self.start, self.decay)
        progress = min(generation, self.generations) / max(self.generations, 1)
        return float(self.start * self.final_fraction**progress)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(WindowOptions, IntegerUpdateOptions, ESConfig):
    """The loop's settings: ``sigma`` is the perturbations' standard deviation, ``lr`` the share of weights to move."""

    def shape(self, fitness: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """The weights of the pairs, ``(P,)``, from all members' scores ``(2 P,)`` in bits per byte.

        The weights are computed from the whole numbers that the model has counted, which the scores are exact for.
        """
        unit = ONE * self.tokens
        scores = np.rint(np.asarray(fitness, np.float64) * unit)
        assert np.array_equal(scores / unit, fitness), "scores of the integer model are whole sixteenths of a bit"
        return (shape_pairs(scores.astype(np.int64), self.fitness) / ONE).astype(np.float32)

    def weight_metrics(self, weights: NDArray[np.float32]) -> dict[str, float]:
        """The share of pairs whose members have equal scores."""
        return {"ties": float((weights == 0).mean())}

    @property
    def lr_at(self) -> Schedule:
        """The share of weights as a function of the generation."""
        final = self.alpha_final / self.lr
        hyperbolic = self.alpha_schedule == "hyperbolic"
        return Alpha("constant", self.lr, self.alpha_decay, self.generations, final, hyperbolic)

    @property
    def sigma_at(self) -> Schedule:
        """Constant."""
        return Schedule("constant", self.sigma)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(WindowOptions, IntegerUpdateOptions, RunOptions, WorkerOptions):
    """Train a language model from scratch in int8, without gradients."""

    data: str = setting("minipile", flags=("-d",))
    """minipile, a hub text data set, a .txt, a folder of .txt, or a .npy of bytes (a byte 0 begins a document)."""
    text_column: str = "text"
    """Column of a hub data set that holds the documents."""
    population_size: int = setting(4096, flags=("-p", "--population", "--pop_size"))
    rank: int = 1
    n_layers: int = 6
    """Blocks of the model."""
    hidden: int = 256
    """Width of the model; powers of four are the fastest."""
    precision: Precision = "int8"
    """int8; fp32 and bf16 train the same network in floating point."""
    generations: int = setting(1000, flags=("-g",), resume=_has_open_end)
    minutes: float | None = setting(None, resume=True)
    """End the run after this many minutes, even if generations are left."""
    group_size: int = 2
    """Members that share a window; both members of a pair always share one."""
    sigma_shift: int = 4
    """The perturbations' standard deviation is 2^-sigma_shift, where that of the first weights is 1."""
    alpha: float = 1.0
    """Share of the weights that an update would move if fitness were noise, in the first generation."""
    lr: float = 0.01
    """Learning rate of fp32 and bf16 (Adam, cosine); alpha takes its place in int8."""
    noise: NoiseKind = "table"
    """table of normals with hashed offsets, or drawn from a counter."""
    noise_table_size: int = DEFAULT_TABLE_SIZE
    """Bytes of the table; the paper has 2^30."""
    noise_reuse: int = 1
    seed: int = 0
    eval_every: int = setting(20, resume=True)
    """Generations between validations."""
    eval_tokens: int = setting(32768, resume=True)
    """Bytes of held-out text, spread over all of it, that a validation reads; the last one reads everything."""
    checkpoint_every: int = 100
    """Generations between checkpoints."""
    sample_every: int = setting(100, resume=True)
    """Generations between samples of text; 0: none."""
    sample_length: int = setting(200, resume=True)
    """Bytes of a sample."""
    prompt: str = setting("", resume=True)
    """What a sample begins with."""
    backend: Backend = setting("auto", resume=True)
    """c (AVX2 or AVX-512 VNNI), torch, or the fastest here."""
    device: str = setting("auto", resume=_is_integer)
    """cpu, cuda, cuda:1; auto takes the CPU if it has AVX-512 VNNI, else a GPU if there is one, else the CPU."""
    threads: int | None = setting(None, resume=True)
    """CPU threads (default: all)."""
    members_per_forward: int | None = setting(None, resume=_is_integer)
    """Members evaluated at once; int8 results do not depend on it."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError.from_problems("pretrain", problems)

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = [
            *whole(
                self, population_size=2, rank=1, n_layers=1, hidden=1, generations=0, tokens=1, context=0, group_size=2
            ),
            *whole(self, sigma_shift=0, momentum_shift=0, noise_table_size=1, noise_reuse=1),
            *whole(self, most=2**64 - 1, seed=0),
            *whole(self, eval_tokens=1, eval_every=1, checkpoint_every=1, sample_every=0, sample_length=1),
            *numbers(self, alpha=(0.0, False), alpha_decay=(0.0, True), alpha_final=(0.0, False)),
            *numbers(self, lr=(0.0, False)),
        ]
        if found:
            return found
        size = self.population_size
        if size % 2:
            found.append(f"population_size (={size}) must be even: members come in pairs; use {size + 1}")
        if self.group_size % 2 or size % self.group_size:
            found.append(
                f"group_size (={self.group_size}) must be even and divide population_size (={size}): both members "
                "of a pair read the same window"
            )
        for name in ("alpha", "alpha_final"):
            if getattr(self, name) > 1:
                found.append(f"{name} (={getattr(self, name)}) is a share of the weights; it must be at most 1")
        if self.sigma_shift > 12:
            found.append(f"sigma_shift (={self.sigma_shift}) must be at most 12: smaller perturbations are all 0 or -1")
        if self.momentum_shift > 16:
            found.append(f"momentum_shift (={self.momentum_shift}) must be at most 16 (2^-16 of it a generation)")
        for name in ("alpha", "alpha_final"):
            if getattr(self, name) < LEAST_ALPHA:
                found.append(
                    f"{name} (={getattr(self, name)}) must be at least {LEAST_ALPHA:g}, one weight in a billion"
                )
        for name in ("threads", "members_per_forward"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                found.append(f"{name} (={value}) must be at least 1; leave it out for a choice that suits this machine")
        if self.threads is not None and self.threads > 4096:
            found.append(f"threads (={self.threads}) is too large; leave it out for a choice that suits this machine")
        if self.backend == "c" and self.device not in ("auto", "cpu"):
            found.append(f"backend='c' runs on the CPU, not on device={self.device!r}; use backend='torch'")
        if self.precision != "int8":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            integer_only = ("alpha", *(field.name for field in dataclasses.fields(IntegerUpdateOptions)))
            given = [name for name in integer_only if getattr(self, name) != defaults[name]]
            if given:
                found.append(
                    f"precision (={self.precision!r}) has Adam and centered ranks: {', '.join(given)} would do "
                    "nothing; leave them out, or use precision='int8'"
                )
        if self.seed >= 2**64:
            found.append(f"seed (={self.seed}) must be below 2**64")
        if self.minutes is not None and not (is_number(self.minutes) and self.minutes > 0):
            found.append(f"minutes (={self.minutes}) must be above 0")
        try:
            self.make_noise().check(self.shape)
        except ConfigError as error:
            found.append(str(error).removeprefix("the model: "))
        return found

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return ModelShape(256, self.hidden, self.n_layers)

    def make_noise(self) -> Noise:
        """Where the draws come from."""
        return Noise(self.seed, self.rank, self.noise, self.noise_table_size, self.noise_reuse)

    def es(self) -> ESConfig:
        """What the generation loop needs to know."""
        shared: dict[str, Any] = {
            "population_size": self.population_size, "rank": self.rank, "sigma": 2.0**-self.sigma_shift,
            "generations": self.generations, "noise_reuse": self.noise_reuse, "seed": self.seed,
        }  # fmt: skip
        if self.precision != "int8":
            return ESConfig(**shared, lr=self.lr, lr_schedule="cosine", optimizer="adam")
        update = {**to_json_values(self, WindowOptions), **to_json_values(self, IntegerUpdateOptions)}
        return PretrainConfig(**shared, lr=self.alpha, fitness_shaping="raw", **update)
