"""The settings of ``eggroll pretrain``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from eggroll.core.check import is_number, numbers, whole
from eggroll.core.config import ESConfig
from eggroll.core.schedules import Schedule
from eggroll.errors import ConfigError
from eggroll.pretrain.engines.base import Backend
from eggroll.pretrain.model.fixed_point import ONE
from eggroll.pretrain.model.noise import DEFAULT_TABLE_SIZE, Noise, NoiseKind
from eggroll.pretrain.model.shape import ModelShape
from eggroll.pretrain.update import Shaping, alpha_at, shape_pairs

Precision = Literal["int8", "fp32", "bf16"]
AlphaSchedule = Literal["hyperbolic", "exponential"]

FREE = (
    "generations", "minutes", "output", "resume", "report_to", "backend", "device", "threads", "members_per_forward",
    "eval_every", "eval_tokens", "sample_every", "sample_length", "sample", "prompt", "temperature",
)  # fmt: skip
"""Options that a resumed run may have other values of: they change no weight."""

LEAST_ALPHA = 1e-9
INTEGER_ONLY = ("alpha", "alpha_schedule", "alpha_decay", "alpha_final", "fitness", "sign_of_noise", "momentum_shift")
"""Options of the integer update."""

arg = tyro.conf.arg


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Train a language model from scratch in int8, without gradients; or sample from one."""

    data: Annotated[str, arg(aliases=["-d"])] = "minipile"
    """minipile, a hub text data set, a .txt, a folder of .txt, or a .npy of bytes (a byte 0 begins a document)."""
    text_column: str = "text"
    """Column of a hub data set that holds the documents."""
    pop_size: Annotated[int, arg(aliases=["-p"])] = 4096
    """Members per generation; both signs of a pair count."""
    rank: int = 1
    """Rank of the perturbations."""
    n_layers: int = 6
    """Blocks of the model."""
    hidden: int = 256
    """Width of the model; powers of four are the fastest."""
    precision: Precision = "int8"
    """int8; fp32 and bf16 train the same network in floating point."""
    generations: Annotated[int, arg(aliases=["-g"])] = 1000
    """Updates."""
    minutes: float | None = None
    """End the run after so many minutes, if its generations are not over before."""
    tokens: int = 16
    """Bytes of a window that a member is scored on. Short windows make more members of the same time."""
    context: int = 16
    """Bytes before the window that the model itself reads first: a member begins with the state after them."""
    group_size: int = 2
    """Members that share a window; the two of a pair always do."""
    sigma_shift: int = 4
    """The perturbations' standard deviation is 2^-sigma_shift, where that of the first weights is 1."""
    alpha: float = 1.0
    """Share of the weights that an update would move if fitness were noise, in the first generation."""
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
    lr: float = 0.01
    """Learning rate of fp32 and bf16 (Adam, cosine); alpha takes its place in int8."""
    noise: NoiseKind = "table"
    """table of normals with hashed offsets, or drawn from a counter."""
    noise_table_size: int = DEFAULT_TABLE_SIZE
    """Bytes of the table; the paper has 2^30."""
    noise_reuse: int = 1
    """Generations that share the same noise."""
    seed: int = 0
    """Seed of everything random."""
    eval_every: int = 20
    """Generations between validations."""
    eval_tokens: int = 32768
    """Bytes of held-out text, spread over all of it, that a validation reads; the last one reads everything."""
    checkpoint_every: int = 100
    """Generations between checkpoints."""
    sample_every: int = 100
    """Generations between samples of text; 0: none."""
    sample_length: int = 200
    """Bytes of a sample."""
    output: Annotated[str | None, arg(aliases=["-o"])] = None
    """Run directory (default: runs/pretrain-<data>-<time>)."""
    resume: str | None = None
    """Continue the run in this directory with the settings it has."""
    sample: str | None = None
    """Print text of the model in this run's directory instead of training."""
    prompt: str = ""
    """What a sample begins with."""
    temperature: float = 1.0
    """Of samples; 0 is greedy."""
    backend: Backend = "auto"
    """c (AVX2 or AVX-512 VNNI), torch, or the fastest here."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto takes the CPU if it has AVX-512 VNNI, else a GPU if there is one, else the CPU."""
    threads: int | None = None
    """CPU threads (default: all)."""
    members_per_forward: int | None = None
    """Members evaluated at once; results do not depend on it."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, none, or several separated by commas."""

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError.from_problems("pretrain", problems)

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = [
            *whole(self, pop_size=2, rank=1, n_layers=1, hidden=1, generations=0, tokens=1, context=0, group_size=2),
            *whole(self, sigma_shift=0, momentum_shift=0, noise_table_size=1, noise_reuse=1, seed=0, eval_tokens=1),
            *whole(self, eval_every=1, checkpoint_every=1, sample_every=0, sample_length=1),
            *numbers(self, alpha=(0.0, False), alpha_decay=(0.0, True), alpha_final=(0.0, False)),
            *numbers(self, temperature=(0.0, True), lr=(0.0, False)),
        ]
        if found:
            return found
        if self.pop_size % 2:
            found.append(f"pop_size (={self.pop_size}) must be even: members come in pairs; use {self.pop_size + 1}")
        if self.group_size % 2 or self.pop_size % self.group_size:
            found.append(
                f"group_size (={self.group_size}) must be even and divide pop_size (={self.pop_size}): "
                "the two of a pair read the same window"
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
        if self.backend == "c" and self.device not in ("auto", "cpu"):
            found.append(f"backend='c' runs on the CPU, not on device={self.device!r}; use backend='torch'")
        if self.precision != "int8":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            given = [name for name in INTEGER_ONLY if getattr(self, name) != defaults[name]]
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
        if self.precision != "int8":
            return ESConfig(
                population_size=self.pop_size, rank=self.rank, sigma=2.0**-self.sigma_shift, lr=self.lr,
                generations=self.generations, optimizer="adam", fitness_shaping="centered_rank",
                lr_schedule="cosine", noise_reuse=self.noise_reuse, seed=self.seed,
            )  # fmt: skip
        return PretrainConfig(
            population_size=self.pop_size,
            rank=self.rank,
            sigma=2.0**-self.sigma_shift,
            lr=self.alpha,
            generations=self.generations,
            fitness_shaping="raw",
            noise_reuse=self.noise_reuse,
            seed=self.seed,
            alpha_schedule=self.alpha_schedule,
            alpha_decay=self.alpha_decay,
            alpha_final=self.alpha_final,
            pair_shaping=self.fitness,
            tokens=self.tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return dataclasses.asdict(self)


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
class PretrainConfig(ESConfig):
    """The loop's settings: ``sigma`` is the perturbations' standard deviation, ``lr`` the share of weights to move."""

    alpha_schedule: AlphaSchedule = "hyperbolic"
    """Course of ``lr``."""
    alpha_decay: float = 0.015
    """Of the hyperbolic one."""
    alpha_final: float = 0.02
    """Last value of the exponential one."""
    pair_shaping: Shaping = "sign"
    """How the two scores of a pair become its weight."""
    tokens: int = 16
    """Bytes that a member is scored on: scores are sixteenths of a bit over this number."""

    def shape(self, fitness: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """The weights of the pairs, ``(P,)``, from all members' scores ``(2 P,)`` in bits per byte.

        The weights are computed from the whole numbers that the model has counted, which the scores are exact for.
        """
        unit = ONE * self.tokens
        scores = np.rint(np.asarray(fitness, np.float64) * unit)
        assert np.array_equal(scores / unit, fitness), "scores of the integer model are whole sixteenths of a bit"
        return (shape_pairs(scores.astype(np.int64), self.pair_shaping) / ONE).astype(np.float32)

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
