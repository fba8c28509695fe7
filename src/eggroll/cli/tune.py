"""``eggroll tune``: evolve a language model on a reward."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from eggroll.cli.watch import option_given, resumed_run
from eggroll.core.config import OptimizerName, Rounding, Sampling, Shaping
from eggroll.core.schedules import ScheduleName
from eggroll.errors import ConfigError, RunError
from eggroll.llm.config import Dtype, EggrollConfig

arg = tyro.conf.arg
DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1"


@dataclass(frozen=True)
class TuneOptions:
    """Everything that ``eggroll tune`` can be told."""

    model: Annotated[tyro.conf.Positional[str], arg(metavar="MODEL")]
    """Hub id, local directory, .gguf file, or smollm2-135m."""
    reward: Annotated[str | None, arg(aliases=["-r"])] = None
    """perplexity, a .py file, "lambda text: ...", package.module:function, or a task."""
    task: str | None = None
    """countdown, gsm8k, one_sentence, zeros, or reasoning-gym:NAME: reward, prompts, held-out prompts and settings."""
    shots: int = 0
    """Worked examples before each problem of a task (countdown, gsm8k)."""
    dataset: Annotated[str | None, arg(aliases=["-d"])] = None
    """Training data: hub id (name or name:config), .jsonl, .txt, .csv, .parquet or folder (default: wikitext-2)."""
    prompts: str | None = None
    """The same as --dataset, for prompts."""
    eval_prompts: str | None = None
    """Held-out prompts or texts, in the same forms."""
    output: Annotated[str | None, arg(aliases=["-o"])] = None
    """Run directory (default: runs/<model>-<reward>-<time>). The evolved model is in its folder model/."""
    resume: str | None = None
    """Continue the run in this directory with the settings it has."""
    generations: Annotated[int, arg(aliases=["-g"])] = 100
    """Evolution generations."""
    population: Annotated[int, arg(aliases=["-p", "--population-size"])] = 64
    """Members per generation."""
    rank: int = 8
    """Rank of the perturbations; 1 is the fastest."""
    sigma: float = 0.01
    """Standard deviation of the perturbations."""
    lr: float = 0.001
    """Learning rate; it absorbs 1/sigma."""
    target_modules: tuple[str, ...] | None = None
    """Only evolve parameters whose names match one of these patterns."""
    exclude: tuple[str, ...] = ()
    """Leave parameters alone whose names match one of these patterns."""
    embeddings: bool = False
    """Evolve the token embedding too."""
    head: bool = False
    """Evolve a separate output head too."""
    vectors: bool = False
    """Evolve norm scales and biases too."""
    optimizer: OptimizerName = "adam"
    """How the estimate becomes a step."""
    lr_schedule: ScheduleName = "exponential"
    """Course of lr over the generations."""
    lr_decay: float = 1.0
    """Factor on lr per generation (exponential)."""
    sigma_schedule: ScheduleName = "exponential"
    """Course of sigma over the generations."""
    sigma_decay: float = 1.0
    """Factor on sigma per generation (exponential)."""
    sampling: Sampling = "antithetic"
    """antithetic pairs, or one_sided with a leave-one-out baseline."""
    noise_reuse: int = 1
    """Generations that share their noise."""
    elite_k: int = 0
    """Only the best k members count; 0: all."""
    weight_decay: float = 0.0
    """L2 regularisation."""
    fitness_shaping: Shaping = "centered_rank"
    """How scores become weights."""
    rounding: Rounding = "auto"
    """How steps reach 16-bit weights: float32 master copies (auto), stochastic rounding, or nearest (loses most)."""
    batch_size: int = 8
    """Prompts or texts per generation."""
    max_tokens: int = 128
    """Longest completion in tokens."""
    max_length: int = 512
    """Longest prompt or text in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    system: str | None = None
    """A system prompt."""
    batch_members: int | None = None
    """Members evaluated together (default: as many as fit comfortably)."""
    eval_every: int = 10
    """Generations between held-out evaluations."""
    checkpoint_every: int = 50
    """Generations between checkpoints."""
    dtype: Dtype = "auto"
    """Weights' dtype; auto takes the faster of float32 and bfloat16 on this machine."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    samples_per_prompt: int = 1
    """Completions of each prompt that a member is scored on; more than one needs a temperature."""
    pass_at: int = 0
    """0 scores a prompt by the mean over its samples, k by the expected best of k of them (pass@k)."""
    backend: Literal["torch", "vllm"] = "torch"
    """Who generates: PyTorch in this process, or a vLLM engine whose adapters are the members."""
    engine_args: str | None = None
    """Further arguments of vllm.LLM as JSON, such as '{"tensor_parallel_size": 2}'."""
    workers: int | None = None
    """Score members in so many worker processes (Ray), each with a replica; results do not depend on how many."""
    ray_address: str | None = None
    """Use this Ray cluster: auto, or host:port (default: workers on this machine)."""
    worker_cpus: int = 1
    """Cores that each worker takes, and threads that it computes with."""
    worker_gpus: float = 0
    """GPUs that each worker takes; 0.5 puts two on one."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, none, or several separated by commas."""
    seed: int = 42
    """Seed of everything random."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    def config(self) -> EggrollConfig:
        """The run's settings.

        Raises:
            ConfigError: some cannot work.
        """
        renamed = {"population": "population_size", "batch_size": "prompts_per_generation"}
        known = {field.name for field in dataclasses.fields(EggrollConfig)}
        values = {renamed.get(key, key): value for key, value in dataclasses.asdict(self).items()}
        return EggrollConfig(**{key: value for key, value in values.items() if key in known})


# What a resumed run takes from the command line instead of from the run.
RESUME_FREE = (
    "generations", "eval_every", "checkpoint_every", "report_to", "device", "engine_args", "workers", "ray_address",
    "worker_cpus", "worker_gpus",
)  # fmt: skip


def default_options(arguments: Sequence[str]) -> TuneOptions | None:
    """Defaults for the command line: the options of the run that ``--resume`` names, or what ``--task`` recommends.

    ``None`` without either. What is given on the command line counts more, whatever its value.
    """
    path = resumed_run(arguments)
    if path is not None:
        return dataclasses.replace(options_of_run(path), resume=path)
    task, shots = option_given(arguments, "--task"), option_given(arguments, "--shots") or "0"
    if not task or task.startswith("-") or not shots.isdecimal():
        return None  # wrong, and told in the words of the command line
    # A default of another word would make that word a choice of the command line.
    backend: Literal["torch", "vllm"] = "vllm" if option_given(arguments, "--backend") == "vllm" else "torch"
    return _with_task(TuneOptions(tyro.MISSING_NONPROP, task=task, shots=int(shots), backend=backend))


def options_of_run(path: str) -> TuneOptions:
    """The options that a run was started with."""
    from eggroll.run.run_dir import RunDir

    stored = RunDir.open(path).config.get("options")
    if not isinstance(stored, dict):
        raise RunError(f"{path} was not started by eggroll tune, so it cannot be resumed by it")
    known = {field.name for field in dataclasses.fields(TuneOptions)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise ConfigError(f"{path}/config.json has settings that this version does not know: {', '.join(unknown)}")
    as_tuples: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in stored.items()}
    return TuneOptions(**as_tuples)


def tune(options: TuneOptions) -> int:
    """Evolve a language model on a reward, without gradients."""
    from eggroll.cli.session import Session

    _check_shots(options)
    options.config()  # every problem of the settings is reported before anything is loaded
    with Session(options) as session:
        return session.run()


def _with_task(options: TuneOptions) -> TuneOptions:
    """A shipped task's recommended settings in the place of those that were left at their defaults.

    What vLLM's adapters cannot evolve is not recommended there.
    """
    if options.task is None or options.resume is not None:
        return options
    from eggroll.llm.tasks import get_task

    task = get_task(options.task, shots=options.shots)
    names = {"population_size": "population", "prompts_per_generation": "batch_size"}
    wanted = {"max_tokens": task.max_tokens, "system": task.system, **task.settings}
    defaults = {field.name: field.default for field in dataclasses.fields(TuneOptions)}
    changes = {}
    beyond_adapters = ("embeddings", "head", "vectors") if options.backend == "vllm" else ()
    for key, value in wanted.items():
        name = names.get(key, key)
        if name not in beyond_adapters and getattr(options, name) == defaults[name]:
            changes[name] = value
    return dataclasses.replace(options, **changes)


def _check_shots(options: TuneOptions) -> None:
    """Refuse worked examples of no task, or of a task whose problems are not what is read."""
    if options.task is None and options.shots:
        raise ConfigError(f"--shots {options.shots} needs a --task whose worked examples are shown; none is given")
    for given in ("dataset", "prompts", "eval_prompts"):
        if options.shots and (file := getattr(options, given)) is not None:
            raise ConfigError(
                f"--shots {options.shots} shows worked examples before the task's own problems, and --"
                f"{given.replace('_', '-')} {file} takes their place as it is: training and held-out prompts would "
                "differ. Leave one of the two out, or write the examples into the file's conversations"
            )


def run_path(options: TuneOptions) -> Path:
    """Where a new run goes."""
    if options.output is not None:
        return Path(options.output)
    what = options.task or options.reward or "perplexity"
    what = "lambda" if what.startswith("lambda") else Path(what).stem
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{Path(options.model).name}-{what}").strip("-").lower()
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def command_line() -> list[str]:
    """The command as it was typed."""
    return ["eggroll", *map(shlex.quote, sys.argv[1:])]


def option_dict(options: TuneOptions) -> dict[str, Any]:
    """Options as JSON values."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(options).items()
    }
