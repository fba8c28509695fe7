"""The options of ``eggroll tune``: a model, a reward, data, and everything that shapes the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from eggroll.core.config import OptimizerName
from eggroll.core.settings import setting
from eggroll.distributed.options import WorkerOptions
from eggroll.llm.config import EggrollConfig, ModelOptions
from eggroll.run.options import RunOptions


def _is_program(reward: str | None) -> bool:
    """Whether a reward is a lambda, a file or a function of a module; the others are words without ``:``, but one."""
    return reward is not None and (
        reward.strip().startswith("lambda")
        or "/" in reward
        or reward.strip().endswith(".py")
        or (":" in reward and not reward.strip().startswith("reasoning-gym:"))
    )


LEARNING_RATES: Mapping[OptimizerName, float] = {"sgd": 0.05, "momentum": 0.005, "adam": 0.003, "adamw": 0.003}
"""What is taken where none is given: with 32 members, steps of up to about 0.003 per entry, a third of ``sigma``."""


@dataclass(frozen=True, kw_only=True)
class TuneSettings(EggrollConfig):
    """``EggrollConfig`` with the command line's defaults: those that the guide and ``make demo`` have."""

    population_size: int = 32
    rank: int = 1
    lr: float = LEARNING_RATES["sgd"]
    """Learning rate; default: 0.05 with sgd, 0.005 with momentum, 0.003 with adam and adamw."""
    optimizer: OptimizerName = "sgd"
    """Which rule turns the estimate into a step; sgd's is of the same size whatever the scores' scale, and smaller for
    larger populations. Adam keeps two float32 numbers per evolved entry, sgd none."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(WorkerOptions, RunOptions, ModelOptions, TuneSettings):
    """Everything that ``eggroll tune`` can be told."""

    model: str = setting(positional="MODEL")
    """Hub id, local directory, .gguf file, or smollm2-135m."""
    reward: str | None = setting(None, flags=("-r",), runs_code=_is_program)
    """perplexity, a .py file, "lambda text: ...", package.module:function, or a task; needed without --task and
    --world."""
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
        empty = self.reward is not None and not self.reward.strip()
        what = "reward is empty; give perplexity, a .py file, a lambda, module:function or a task, or leave it out"
        return [*super().problems(), *([what] if empty else [])]
