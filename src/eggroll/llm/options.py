"""The options of ``eggroll tune``: a model, a reward, data, and everything that shapes the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from eggroll.core.check import is_number
from eggroll.core.config import OptimizerName
from eggroll.core.schedules import ScheduleName
from eggroll.core.settings import setting
from eggroll.distributed.options import WorkerOptions
from eggroll.llm.choosing.auto import AUTO, STAND_INS, automatic
from eggroll.llm.config import EggrollConfig, ModelOptions
from eggroll.llm.judging import JudgeOptions
from eggroll.run.keeping import Keep
from eggroll.run.options import RunOptions


def _is_program(reward: str | None) -> bool:
    """Whether a reward is a lambda, a file or a function of a module; the others are words without ``:``, but one."""
    return reward is not None and (
        reward.strip().startswith("lambda")
        or "/" in reward
        or reward.strip().endswith(".py")
        or (":" in reward and not reward.strip().startswith("reasoning-gym:"))
    )


Whole = int | Literal["auto"]
Number = float | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class TuneSettings(EggrollConfig):
    """``EggrollConfig`` with the command line's defaults; what is ``auto`` is chosen when a run begins."""

    population_size: Whole = setting(AUTO, flags=("-p", "--population", "--pop_size"))  # type: ignore[assignment]
    """Members per generation; both signs of an antithetic pair count. auto: 32, with --minutes what fits."""
    prompts_per_generation: Whole = setting(AUTO, flags=("--batch-size",))  # type: ignore[assignment]
    """Prompts (or texts) that every member is scored on in a generation. auto: 8, with --minutes what fits."""
    generations: Whole = setting(AUTO, flags=("-g",), resume=True)  # type: ignore[assignment]
    """Number of updates. auto: 100, with --minutes as many as fit."""
    rank: int = 1
    sigma: Number = AUTO  # type: ignore[assignment]
    """Standard deviation of a perturbation's entries. auto: a few evaluations find the largest at which members still
    behave."""
    lr: Number = AUTO  # type: ignore[assignment]
    """Learning rate. auto: steps of a fraction of sigma per entry, whatever the optimizer and the population."""
    lr_schedule: ScheduleName | Literal["auto"] = AUTO  # type: ignore[assignment]
    """constant, exponential (by lr_decay), linear or cosine (towards 0 after the last). auto: linear if lr is auto,
    else exponential."""
    optimizer: OptimizerName = "sgd"
    """Which rule turns the estimate into a step; sgd's is of the same size whatever the scores' scale, and smaller for
    larger populations. Adam keeps two float32 numbers per evolved entry, sgd none."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        names = automatic(self)
        checked = object.__new__(EggrollConfig)  # the settings with numbers in all places, unchecked
        for field in dataclasses.fields(EggrollConfig):
            value = STAND_INS[field.name] if field.name in names else getattr(self, field.name)
            object.__setattr__(checked, field.name, value)
        return checked.problems()


@dataclass(frozen=True, kw_only=True)
class TuneOptions(WorkerOptions, RunOptions, ModelOptions, JudgeOptions, TuneSettings):
    """Everything that ``eggroll tune`` can be told."""

    model: str = setting(positional="MODEL")
    """Hub id, local directory, .gguf file, or smollm2-135m, gemma3-270m, qwen2.5-coder-1.5b."""
    reward: str | None = setting(None, flags=("-r",), runs_code=_is_program)
    """perplexity, a .py file, "lambda text: ...", package.module:function, or a task; needed without --task and
    --judge-url or --world."""
    task: str | None = None
    """calculator, countdown, gsm8k, guess_number, maze, one_sentence, zeros, or reasoning-gym:NAME: reward, prompts,
    held-out prompts and settings."""
    shots: int = 0
    """Worked examples before each problem of a task (countdown, gsm8k)."""
    world: str | None = setting(None, flags=("--environment",), runs_code=bool)
    """A world that the model talks to, FILE.py:Class or package.module:Class (also one for TRL's
    environment_factory)."""
    dataset: str | None = setting(None, flags=("-d",))
    """Training data: hub id (name or name:config), .jsonl, .txt, .csv, .parquet or folder (default: wikitext-2)."""
    prompts: str | None = None
    """The same as --dataset, for prompts."""
    eval_prompts: str | None = None
    """Held-out prompts or texts, in the same forms."""
    backend: Literal["torch", "vllm"] = "torch"
    """Who generates: PyTorch in this process, or a vLLM engine whose adapters are the members."""
    minutes: float | None = setting(None, resume=True)
    """Time for the run: generations, population and prompts that are auto are chosen to fit, and it ends in time."""
    keep: Keep = setting("best", resume=True, absent="last")
    """Which weights the saved model has: those of the best held-out score (the last, without held-out data), or the
    last. Checkpoints have both."""
    engine_args: str | None = setting(None, resume=True, runs_code=bool)
    """Further arguments of vllm.LLM as JSON, such as '{"tensor_parallel_size": 2}'."""

    # It acts with the token of whoever runs it, so it is not taken from a run of someone else, as little as code is.
    push_to_hub: bool = setting(False, resume=True, runs_code=bool)
    """Push the saved model and its card to the Hugging Face hub when the run has ended."""
    hub_model_id: str | None = setting(None, resume=True)
    """Repository for --push-to-hub (default: the run directory's name, under your account)."""
    hub_private: bool = setting(False, resume=True)
    """Make that repository private, if it is new."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        keeps = get_args(Keep)
        keep = [] if self.keep in keeps else [f"keep (={self.keep!r}) must be one of: {', '.join(keeps)}"]
        empty = self.reward is not None and not self.reward.strip()
        what = "reward is empty; give perplexity, a .py file, a lambda, module:function or a task, or leave it out"
        short = self.minutes is not None and not (is_number(self.minutes) and self.minutes > 0)
        time = f"minutes (={self.minutes}) must be above 0, or left out for no limit"
        return [*super().problems(), *([what] if empty else []), *([time] if short else []), *keep]
