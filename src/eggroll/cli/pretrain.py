"""``eggroll pretrain``: a language model from scratch in int8, without gradients."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from eggroll._optional import require
from eggroll.cli.watch import Watch, resumed_run, show_result
from eggroll.pretrain.config import PretrainOptions

if TYPE_CHECKING:
    from eggroll.pretrain.data import Corpus
    from eggroll.pretrain.trainer import Trained
    from eggroll.pretrain.worker import IntegerLearner
    from eggroll.run.run_dir import RunDir


def pretrain(options: PretrainOptions) -> int:
    """Train a recurrent language model that lives in int8 from scratch, or print text of one (--sample RUN)."""
    require("torch", extra="torch")
    from eggroll.pretrain.trainer import sample_run, train

    console = Console(soft_wrap=True, highlight=False)
    if options.threads is not None:
        import torch

        torch.set_num_threads(options.threads)
    if options.sample is not None:
        text = sample_run(
            options.sample, options.prompt, options.sample_length, temperature=options.temperature, seed=options.seed,
            backend=options.backend, device=options.device, threads=options.threads,
        )  # fmt: skip
        # A young model writes any bytes; those that would steer the terminal are shown as a replacement character.
        shown = (char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
        console.print(options.prompt + "".join(shown), markup=False)
        return 0
    title = f"{options.n_layers} layers x {options.hidden}"
    with Watch(console, options.report_to, lambda _: title) as watch:
        trained = train(options, listeners=watch.listeners, opened=lambda *what: _opened(console, options, *what))
    if trained.interrupted:
        command = f"eggroll pretrain --resume {shlex.quote(str(trained.run.path))}"
        console.print(f"\ninterrupted after generation {trained.generation}; continue with\n         {command}")
        return 130
    _finish(console, trained, options)
    return 0


def default_options(arguments: Sequence[str]) -> PretrainOptions | None:
    """The options of the run that ``--resume DIR`` names, as defaults of the command line; ``None`` without it."""
    from eggroll.pretrain.trainer import options_of_run

    path = resumed_run(arguments)
    return None if path is None else dataclasses.replace(options_of_run(path), resume=path)


def _opened(console: Console, options: PretrainOptions, run: RunDir, learner: IntegerLearner, corpus: Corpus) -> None:
    members = f"{options.pop_size:,} members x {options.tokens} bytes"
    console.print(
        f"[bold]{options.n_layers} layers x {options.hidden}[/], "
        f"{options.shape.size:,} {options.precision} parameters\n"
        f"data     {escape(options.data)}: {len(corpus.train):,} bytes to train on, "
        f"{len(corpus.validation):,} held out\n"
        f"search   {members}, {options.group_size} a window, rank {options.rank}, sigma 2^-{options.sigma_shift}, "
        f"seed {options.seed}\nengine   {type(learner.engine).__name__}\n"
        f"[dim]run directory: {escape(str(run.path))}[/]\n"
        "[dim]the held-out reward is minus the bits per byte of held-out text[/]\n"
    )


def _finish(console: Console, trained: Trained, options: PretrainOptions) -> None:
    from eggroll.run.report import write_report

    report = write_report(trained.run)
    show_result(console, trained.result)
    path = shlex.quote(str(trained.run.path))
    console.print(f"\nreport   {escape(str(report))}\ntext     eggroll pretrain --sample {escape(path)} --prompt '...'")
    if options.minutes is not None and trained.generation < options.generations:
        console.print(
            f"more     eggroll pretrain --resume {escape(path)} --minutes M    "
            f"[dim](in all: {options.minutes:g} minutes are over after generation {trained.generation:,} of "
            f"{options.generations:,})[/]"
        )
