"""``eggroll pretrain``: a language model from scratch in int8, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from eggroll._optional import require
from eggroll.cli.watch import quoted, resumed_options, run_command
from eggroll.core.check import numbers
from eggroll.core.settings import to_json_values
from eggroll.pretrain.config import PretrainOptions

if TYPE_CHECKING:
    from eggroll.lifecycle import Trained


@dataclass(frozen=True, kw_only=True)
class PretrainCommand(PretrainOptions):
    """The settings of a run, and those of a look at one (--sample)."""

    sample: str | None = None
    """Print text of the model in this run's directory instead of training."""
    temperature: float = 1.0
    """Of the text that --sample prints; 0 takes the most likely byte each time."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        return [*numbers(self, temperature=(0.0, True)), *super().problems()]


OPTIONS = PretrainCommand


def run(options: PretrainCommand) -> int:
    """Train a recurrent language model that lives in int8 from scratch, or print text of one (--sample RUN)."""
    require("torch", extra="torch")
    from eggroll.pretrain.kind import KIND

    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    if options.sample is not None:
        return _sample(options, options.sample)
    return run_command(KIND, PretrainOptions(**to_json_values(options, PretrainOptions)), _show)


def default_options(arguments: Sequence[str]) -> PretrainCommand | None:
    """The options of the run that ``--resume DIR`` names, as defaults of the command line; ``None`` without it."""
    from eggroll.pretrain.kind import KIND

    found = resumed_options(KIND, arguments)
    return None if found is None else PretrainCommand(**to_json_values(found))


def _sample(options: PretrainCommand, run: str) -> int:
    from eggroll.pretrain.kind import sample_run

    text = sample_run(
        run, options.prompt, options.sample_length, temperature=options.temperature, seed=options.seed,
        backend=options.backend, device=options.device, threads=options.threads,
    )  # fmt: skip
    # A young model writes any bytes; those that would steer the terminal are shown as a replacement character.
    shown = (char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    console.print(options.prompt + "".join(shown), markup=False)
    return 0


def _show(console: Console, trained: Trained) -> None:
    path, options = quoted(trained.run.path), trained.plan.options
    console.print(f"text     eggroll pretrain --sample {path} --prompt '...'")
    if options.minutes is not None and not trained.interrupted and trained.generation < options.generations:
        console.print(
            f"more     eggroll pretrain --resume {path} --minutes M    "
            f"[dim](in all: {options.minutes:g} minutes are over after generation {trained.generation:,} of "
            f"{options.generations:,})[/]"
        )
