"""``eggroll eval``: how good a model is at a task, and what changed between two."""

from __future__ import annotations

import dataclasses
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from eggroll.cli.asking import check_output
from eggroll.core.settings import setting
from eggroll.errors import ConfigError
from eggroll.llm.config import EggrollConfig, GenerationOptions, ModelOptions
from eggroll.llm.worlds.options import WorldOptions
from eggroll.run.terminal import Terminal

if TYPE_CHECKING:
    from eggroll.llm.data.examples import Example
    from eggroll.llm.measure.evaluate import Comparison, Result
    from eggroll.llm.measure.intervals import Interval
    from eggroll.llm.tasks import Task


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ModelOptions, WorldOptions, GenerationOptions):
    """Everything that ``eggroll eval`` can be told."""

    models: tuple[str, ...] = setting(positional="MODEL [MODEL]")
    """One model, or two to compare, before and after: hub id, local directory, .gguf file, or smollm2-135m,
    gemma3-270m, qwen2.5-coder-1.5b."""
    task: str = setting()
    """calculator, countdown, gsm8k, guess_number, maze, one_sentence, zeros, reasoning-gym:NAME, or a suite: aime24,
    aime25, amc, math500, minerva, olympiad."""
    shots: int = 0
    """Worked examples before each problem (countdown, gsm8k)."""
    problems: int | None = None
    """Test problems that are answered (default: 128, or all if there are fewer)."""
    samples: int = 1
    """Answers to each problem, for pass@k; more than one needs a --temperature above 0."""
    max_tokens: int | None = None  # type: ignore[assignment]
    """Longest completion in tokens (default: the task's)."""
    max_length: int | None = None  # type: ignore[assignment]
    """Longest prompt in tokens (default: the task's)."""
    system: str | None = None
    """A system prompt (default: the task's)."""
    max_turns: int | None = None  # type: ignore[assignment]
    """Most completions in a conversation with a world (default: the task's)."""
    batch_size: int = 16
    """Answers made together."""
    output: str | None = setting(None, flags=("-o",))
    """A JSON file for the figures and all answers."""
    seed: int = 42
    """Which test problems are answered, the resampling, and sampled tokens."""

    def config(self, task: Task) -> EggrollConfig:
        """The settings with the task's in the place of those that were not given.

        Raises:
            ConfigError: some cannot work.
        """
        problems = []
        if not 1 <= len(self.models) <= 2:
            problems.append(f"one model or two can be evaluated, not {len(self.models)}")
        if self.batch_size < 1:
            problems.append(f"batch_size (={self.batch_size}) must be at least 1")
        if self.samples < 1:
            problems.append(f"samples (={self.samples}) must be at least 1, the answers to each problem")
        elif self.samples > 1 and self.temperature == 0:
            problems.append(
                f"samples (={self.samples}) are answers to each problem, which are all the same at temperature 0: add "
                "--temperature 0.7, or so; the number of test problems is --problems"
            )
        if problems:
            raise ConfigError.from_problems("eggroll eval", problems)
        return EggrollConfig(
            max_tokens=task.max_tokens if self.max_tokens is None else self.max_tokens,
            max_length=task.settings.get("max_length", EggrollConfig.max_length)
            if self.max_length is None
            else self.max_length,
            temperature=self.temperature,
            chat=self.chat,
            system=task.system if self.system is None else self.system,
            seed=self.seed,
            max_turns=task.settings.get("max_turns", EggrollConfig.max_turns)
            if self.max_turns is None
            else self.max_turns,
            world_timeout=self.world_timeout,
            world_failure_score=self.world_failure_score,
            world_workers=self.world_workers,
        )


OPTIONS = EvalOptions


def run(options: EvalOptions) -> int:
    """Measure a model on a task's test problems, or compare two, with 95 % confidence intervals."""
    from eggroll.llm.measure.evaluate import compare, draw_problems
    from eggroll.llm.tasks import get_task

    console = Terminal(soft_wrap=True, highlight=False)
    with console.status(f"making the problems of {escape(options.task)} ..."):
        task = get_task(options.task, shots=options.shots)
        config = options.config(task)
        problems = draw_problems(task, options.problems, options.seed)
    if options.output is not None:
        check_output(Path(options.output), "eval.json")
    times = f"{options.samples} answers to each, " if options.samples > 1 else ""
    console.print(f"[bold]{escape(task.name)}[/]  {escape(task.description)} {len(problems)} test problems, {times}"
                  f"{config.max_tokens} tokens at most, seed {options.seed}")  # fmt: skip
    results: list[Result] = []
    dtype: Any = options.dtype
    for model in options.models:
        result, dtype = _answers(model, dtype, options, task, problems, config, console)
        results.append(result)
    comparison = compare(results[0], results[1], task, seed=options.seed) if len(results) == 2 else None
    _show(console, options, task, results, comparison)
    if options.output is not None:
        _write(Path(options.output), options, task, config, dtype, problems, results, comparison)
        console.print(f"\nfigures and answers: {escape(options.output)}")
    return 0


def _answers(
    model: str,
    dtype: Any,
    options: EvalOptions,
    task: Task,
    problems: list[Example],
    config: EggrollConfig,
    console: Console,
) -> tuple[Result, str]:
    """One model's answers, and the dtype that it had, so that the next one has the same."""
    from eggroll.llm.generation.defaults import GenerationDefaults
    from eggroll.llm.measure.evaluate import evaluate as answer
    from eggroll.llm.models import loading
    from eggroll.llm.models.locate import is_hub_id

    with console.status(f"loading {escape(model)} ..."):
        trust = options.trust_remote_code
        loaded = loading.load(
            model, dtype=dtype, device=options.device, trust_remote_code=trust, quantize=options.quantize,
            revision=options.revision if is_hub_id(model) or not any(map(is_hub_id, options.models)) else None,
            attn_implementation=options.attn_implementation,
        )  # fmt: skip
    for note in GenerationDefaults.of(loaded.model.generation_config, config.temperature).notes():
        console.print(f"[dim]{escape(model)}: {escape(note)}[/]")
    with _Bar(model, len(problems) * options.samples, console) as bar:
        result = answer(
            loaded, task, problems, config, samples=options.samples, batch_size=options.batch_size, listener=bar.show
        )
    used = str(loaded.dtype).removeprefix("torch.")
    del loaded
    gc.collect()  # two models need not fit side by side
    return result, used


class _Bar:
    """A progress bar on a terminal, a line every tenth elsewhere."""

    def __init__(self, model: str, total: int, console: Console) -> None:
        self.model, self.total, self.console = model, total, console
        self.next = 0.1
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "[dim]{task.fields[note]}[/]")
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console)
        self.bar = self.progress.add_task(escape(model), total=total, note="")

    def __enter__(self) -> _Bar:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def show(self, result: Result) -> None:
        """Show how far it is."""
        done = len(result.scores)
        note = f"{result.right} right, mean {sum(result.scores) / done:.3f}, {result.tokens / result.seconds:.0f} tok/s"
        self.progress.update(self.bar, completed=done, note=note)
        if not self.console.is_terminal and done >= self.next * self.total:
            self.console.print(f"{escape(self.model)}: {done} of {self.total}, {note}")
            self.next = done / self.total + 0.1


def _show(
    console: Console, options: EvalOptions, task: Task, results: list[Result], comparison: Comparison | None
) -> None:
    table = Table(title="95 % intervals in brackets", title_justify="left", title_style="dim")
    for heading in ("model", "accuracy", "mean reward", "tokens an answer"):
        table.add_column(heading, overflow="fold")
    for model, result in zip(options.models, results, strict=True):
        right = f"{_percent(result.accuracy(seed=options.seed))}  {result.right} of {len(result.scores)}"
        mean = _number(result.mean(task, seed=options.seed))
        table.add_row(escape(model), right, mean, f"{result.tokens / len(result.scores):.0f}")
    if comparison is not None:
        change = f"{_percent(comparison.accuracy, sign='+')}  {comparison.gained} gained, {comparison.lost} lost"
        table.add_row("difference, paired", change, _number(comparison.mean, sign="+"), "", style="bold")
    Terminal(highlight=False).print(table)
    if options.samples > 1:
        _show_passes(console, options, results, comparison)
    for line in _verdict(results[0].problems, len(task.test or task.heldout), comparison):
        console.print(line)


def _show_passes(console: Console, options: EvalOptions, results: list[Result], comparison: Comparison | None) -> None:
    """How many problems are solved by the best of k answers."""
    from eggroll.llm.measure.evaluate import ks_of
    from eggroll.llm.tasks import SOLVED

    console.print(
        f"\npass@k: problems solved by at least one of k answers, from {options.samples} to each "
        f"(solved: a score of {SOLVED:g})", style="dim",
    )  # fmt: skip
    table = Table()
    for heading in ("pass@k", *map(escape, options.models), *(["difference, paired"] if comparison else [])):
        table.add_column(heading, overflow="fold")
    for k in ks_of(options.samples):
        cells = [_percent(result.pass_at(k, seed=options.seed)) for result in results]
        change = [] if comparison is None else [_percent(comparison.passes[k], sign="+")]
        table.add_row(f"pass@{k}", *cells, *change)
    Terminal(highlight=False).print(table)


def _verdict(count: int, there_are: int, comparison: Comparison | None) -> list[str]:
    """What the figures of ``count`` problems say in words, and that few problems say little."""
    from eggroll.llm.measure.evaluate import DEFAULT_PROBLEMS
    from eggroll.llm.measure.intervals import FEW, mcnemar

    more = min(DEFAULT_PROBLEMS, there_are)
    advice = f"; --problems {more} would tell more" if more > count else ""
    problems = "1 problem" if count == 1 else f"{count} problems"
    few = [f"{problems}: too few for more than an impression, as the width of the intervals says{advice}"]
    if comparison is None:
        return few if count < FEW else []
    at_best = mcnemar(count, 0)
    if at_best > 0.05:
        return [f"too few problems to tell: with {problems}, even {count} gained and none lost would show nothing "
                f"(p = {at_best:.3g}, McNemar, exact){advice}"]  # fmt: skip
    mean = comparison.mean
    clear = mean.low > 0 or mean.high < 0
    shown = "" if clear else f", so no difference is shown (with {problems} only one of about " \
        f"{(mean.high - mean.low) / 2:.2g} would be)"  # fmt: skip
    return [
        f"the interval of the mean reward's difference {'excludes' if clear else 'includes'} 0{shown}; gained against "
        f"lost: p = {comparison.p_value:.3g} (McNemar, exact)",
        *(few if count < FEW else []),
    ]


def _percent(interval: Interval, sign: str = "") -> str:
    values = (f"{100 * value:{sign}.1f}" for value in (interval.value, interval.low, interval.high))
    return "{} % \\[{}, {}]".format(*values)


def _number(interval: Interval, sign: str = "") -> str:
    values = (f"{value:{sign}.3f}" for value in (interval.value, interval.low, interval.high))
    return "{} \\[{}, {}]".format(*values)


def _write(
    path: Path,
    options: EvalOptions,
    task: Task,
    config: EggrollConfig,
    dtype: str,
    problems: list[Example],
    results: list[Result],
    comparison: Comparison | None,
) -> None:
    from eggroll.llm.generation.chat import plain_text
    from eggroll.llm.measure.evaluate import ks_of
    from eggroll.run.files import write_atomic
    from eggroll.run.provenance import environment

    figures = [
        {
            "model": model,
            "right": result.right,
            "accuracy": dataclasses.asdict(result.accuracy(seed=options.seed)),
            "pass_at": {
                str(k): dataclasses.asdict(result.pass_at(k, seed=options.seed)) for k in ks_of(options.samples)
            },
            "mean_reward": dataclasses.asdict(result.mean(task, seed=options.seed)),
            "tokens": result.tokens,
            "seconds": round(result.seconds, 3),
        }
        for model, result in zip(options.models, results, strict=True)
    ]
    rows = [
        {
            "prompt": plain_text(problem.prompt or ""),
            **problem.columns,
            "answers": [
                {"completion": result.completions[row], "reward": result.scores[row]}
                for result in results
                for row in range(i * options.samples, (i + 1) * options.samples)
            ],
        }
        for i, problem in enumerate(problems)
    ]
    settings = {"max_tokens": config.max_tokens, "max_length": config.max_length, "system": config.system}
    content = {
        "task": task.name,
        "shots": options.shots,
        "split": "test" if task.test else "heldout",
        "samples": options.samples,
        "settings": {**settings, "temperature": config.temperature, "dtype": dtype, "device": options.device,
                     "batch_size": options.batch_size, "seed": options.seed},
        "models": figures,
        "difference": None if comparison is None else dataclasses.asdict(comparison),
        "problems": rows,
        "environment": environment(),
    }  # fmt: skip
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
