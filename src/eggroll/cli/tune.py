"""``eggroll tune``: evolve a language model on a reward."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eggroll._command import typed
from eggroll.cli.watch import heldout_scores, option_given, resumed_options, run_command, show_kept
from eggroll.errors import ModelError
from eggroll.llm.choosing.auto import AUTO
from eggroll.llm.options import TuneOptions
from eggroll.run.terminal import printable

if TYPE_CHECKING:
    from eggroll.lifecycle import Trained

OPTIONS = TuneOptions


def run(options: TuneOptions) -> int:
    """Evolve a language model on a reward, without gradients."""
    from eggroll.llm.kind import KIND

    return run_command(KIND, options, _show)


def default_options(arguments: Sequence[str]) -> TuneOptions | None:
    """Defaults for the command line: the options of the run that ``--resume`` names, or what ``--task`` recommends.

    A learning rate belongs to its optimizer, so with another ``--optimizer`` it is chosen. ``None`` without any of
    these. What is given on the command line counts more, whatever its value.
    """
    if option_given(arguments, "--resume") is not None:
        from eggroll.llm.kind import KIND

        return resumed_options(KIND, arguments)
    task, shots = option_given(arguments, "--task"), option_given(arguments, "--shots") or "0"
    if not task or task.startswith("-") or not shots.isdecimal():  # none, or wrong and told by the command line
        return None
    import tyro

    # A default of another word would make that word a choice of the command line.
    backend: Literal["torch", "vllm"] = "vllm" if option_given(arguments, "--backend") == "vllm" else "torch"
    options = with_task(TuneOptions(model=tyro.MISSING_NONPROP, task=task, shots=int(shots), backend=backend))
    other = option_given(arguments, "--optimizer") not in (None, options.optimizer)
    return dataclasses.replace(options, lr=AUTO) if other else options


def with_task(options: TuneOptions) -> TuneOptions:
    """A shipped task's recommended settings in the place of those that were left at their defaults.

    What vLLM's adapters cannot evolve is not recommended there.
    """
    if options.task is None or options.resume is not None:
        return options
    from eggroll.llm.tasks import check_trainable, get_task

    check_trainable(options.task)
    task = get_task(options.task, shots=options.shots)
    wanted = {"max_tokens": task.max_tokens, "system": task.system, **task.settings}
    defaults = {field.name: field.default for field in dataclasses.fields(TuneOptions)}
    beyond_adapters = ("embeddings", "head", "vectors") if options.backend == "vllm" else ()
    changes = {
        name: value
        for name, value in wanted.items()
        if name not in beyond_adapters and getattr(options, name) == defaults[name]
    }
    return dataclasses.replace(options, **changes)


def _show(console: Console, trained: Trained) -> None:
    """Held-out reward and answers before and after, whose weights are saved and where, and how they are loaded."""
    from eggroll.llm.judging import unscored_line
    from eggroll.llm.kind import KIND, MODEL
    from eggroll.run.report import before_and_after

    run, kept = trained.run, trained.kept
    scores = [score for score in heldout_scores(run) if score[0] <= kept.generation]
    when, saved = "", ""
    if len(scores) >= 2:
        (_, before), (generation, after) = scores[0], scores[-1]
        if generation != trained.generation:
            when = f" after generation {generation}"
        if generation != kept.generation:  # interrupted between two evaluations
            saved = f" [dim](the saved model is that of generation {kept.generation}, which has no score)[/]"
        after_text = f"{after:.3f}{when or ' after'}"
        console.print(f"\nheld-out reward  [bold]{before:.3f} before, {after_text}[/]{saved}")
    show_kept(console, kept)
    samples = [row for row in run.samples() if row["generation"] <= kept.generation]
    compared = [row for row in before_and_after(samples) if row.before is not None and row.after is not None]
    rows = [row for row in compared if _text(row.before)[0] != _text(row.after)[0]]
    if rows:
        title = f"the first of {len(rows)} held-out answers (of {len(compared)}) that changed{when}, with their rewards"
        table = Table(title=title, title_justify="left", expand=True)
        table.add_column("prompt", ratio=2)
        table.add_column("before", ratio=3)
        table.add_column("after", ratio=3)
        for row in rows[:3]:
            table.add_row(_cell(row.prompt, None), _cell(*_text(row.before)), _cell(*_text(row.after)))
        console.print(table, soft_wrap=False)
    if (unscored := unscored_line(run.metrics())) is not None:
        console.print(f"\n[yellow]{escape(unscored)}[/]")
    console.print(f"\nmodel    {escape(str(run.path / MODEL))}")
    console.print(f"ask it   [bold]{escape(f'{typed()} chat {shlex.quote(str(run.path))}')}[/]")
    # Without an indent, so that it can be copied into Python.
    console.print(f"in Python:\n\n[bold]{escape(str(KIND.load_line(run)))}[/]\n")
    if trained.plan.options.push_to_hub and not trained.interrupted:
        _push(console, run.path / MODEL, trained.plan.options)


def _push(console: Console, directory: Path, options: TuneOptions) -> None:
    """Push the saved model; whatever comes in between, the run is complete."""
    from eggroll.llm.models.push import later, push

    name = options.hub_model_id or repository_name(directory.absolute().parent.name)
    try:
        with console.status(f"pushing to {escape(name)} ..."):
            address = push(directory, name, private=options.hub_private)
    except ModelError as error:
        console.print(f"[bold red]not pushed:[/] {escape(str(error))}")
    except KeyboardInterrupt:
        command = later(directory, name, private=options.hub_private)
        console.print(f"[bold red]not pushed:[/] interrupted. The run is complete; push it later: {escape(command)}")
    else:
        console.print(f"pushed   {escape(address)}")


def repository_name(folder: str) -> str:
    """A name that the hub takes, from a folder's."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", re.sub(r"[-.]{2,}", "-", folder)).strip("-.")[:96] or "eggroll-model"


def _text(sample: Any) -> tuple[str, float | None]:
    if isinstance(sample, dict):
        said = sample.get("completion", "")
        if isinstance(said, list):  # a conversation with a world
            said = " | ".join(f"{turn.get('role')}: {turn.get('content')}" for turn in said)
        return str(said), sample.get("reward")
    return str(sample), None


def _cell(text: Any, reward: float | None) -> str:
    shown = escape(printable(" ".join(str(text).split())))
    return shown if reward is None else f"{shown}  [dim]({reward:.2f})[/]"
