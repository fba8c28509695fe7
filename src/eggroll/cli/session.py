"""One ``eggroll tune`` from the first line on the terminal to the last."""

from __future__ import annotations

import dataclasses
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eggroll.cli.backends import make_trainer
from eggroll.cli.tune import (
    DEFAULT_DATASET,
    RESUME_FREE,
    TuneOptions,
    command_line,
    option_dict,
    options_of_run,
    run_path,
)
from eggroll.errors import ConfigError, DataError, EggrollError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.models.export import load_line
from eggroll.llm.tasks import get_task, row_check
from eggroll.llm.trainer import EggrollTrainer
from eggroll.run.console import Display
from eggroll.run.report import before_and_after, write_report
from eggroll.run.run_dir import RunDir
from eggroll.run.trackers import Tracker, TrackerListener, make_trackers, tracker_names


class Session:
    """Loads everything, runs the generations with a live display, and shows what came of it."""

    def __init__(self, options: TuneOptions) -> None:
        self.options = options
        self.console = Console(soft_wrap=True, highlight=False)
        self.tracker: Tracker | None = None
        self.run_dir: RunDir | None = None
        self.trainer: EggrollTrainer | None = None
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        warnings.showwarning = self._warn
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._warnings.__exit__(kind, error, trace)
        if isinstance(error, EggrollError) and self.run_dir is not None:
            error.add_note(_way_on(self.run_dir, self.options))
        if self.tracker is not None:
            self.tracker.close()
        if self.trainer is not None:
            self.trainer.cleanup()

    def _warn(self, message: Warning | str, *_: Any, **__: Any) -> None:
        """A warning as a line above the display, without the place in the code that it came from."""
        self.console.print(f"[yellow]warning:[/] {escape(str(message))}")

    def run(self) -> int:
        """The whole command. Returns the exit status: 0, or 130 if it was interrupted."""
        options = self.options
        tracker_names(options.report_to)
        train, heldout = self._data()
        if options.resume is None and (run_path(options) / "config.json").exists():
            RunDir.create(run_path(options), {})  # raises: the directory holds a run
        with self.console.status(f"loading {options.model} ..."):
            trainer = self.trainer = make_trainer(options)
            if options.workers is not None:
                trainer.worker.use(train, heldout)  # now, so that a wrong address is known before there is a directory
        # What was chosen automatically is part of the run from now on, so that it is the same when resumed.
        self.options = options = dataclasses.replace(options, dtype=trainer.worker.setup.dtype_name)  # type: ignore[arg-type]
        run = self.run_dir = self._run_dir(trainer)
        self.tracker = make_trackers(options.report_to, run)
        self._header(trainer, run, len(train))
        config = trainer.config
        display = Display(
            config.generations,
            start=self._finished(run),
            title=_title(options),
            history=run.metrics(),
            console=self.console,
        )
        with display:
            trainer.evolve(
                train,
                eval_data=heldout,
                run=run,
                resume=options.resume is not None,
                listeners=[display, TrackerListener(self.tracker)],
            )
        return self._finish(trainer, run)

    def _finished(self, run: RunDir) -> int:
        return len(run.updates()) if self.options.resume is not None else 0

    def _data(self) -> tuple[list[Any], list[Any] | None]:
        options = self.options
        if options.task is not None:
            task = get_task(options.task, shots=options.shots)
            source = _one_source(options)
            train = task.train if source is None else _load(source, options)
            heldout = task.heldout if options.eval_prompts is None else _load(options.eval_prompts, options)
            return load_examples(train), load_examples(heldout)
        source = _one_source(options) or DEFAULT_DATASET
        heldout_source = options.eval_prompts
        return self._training_data(source), None if heldout_source is None else _load(heldout_source, options)

    def _training_data(self, source: str) -> list[Any]:
        options = self.options
        if source != DEFAULT_DATASET or options.dataset is not None or options.reward in (None, "perplexity"):
            return _load(source, options)
        try:
            examples = _load(source, options)
        except DataError as error:
            raise DataError(
                f"--reward {options.reward} needs prompts to answer: give --prompts with a .jsonl or .txt file, a "
                f"folder or a hub id. Without it wikitext-2 would be taken, but {error}"
            ) from error
        self.console.print("no --prompts given: the lines of wikitext-2 are the prompts")
        return examples

    def _run_dir(self, trainer: EggrollTrainer) -> RunDir:
        options = self.options
        settings = {"options": option_dict(options), "config": trainer.config.to_dict()}
        if options.resume is None:
            extra = {"model": options.model, "device": trainer.worker.setup.place}
            return RunDir.create(run_path(options), settings, command=command_line(), extra=extra)
        run = RunDir.open(options.resume)
        _check_resumed(run, settings)
        finished = len(run.updates())
        if options.generations < finished:
            raise ConfigError(
                f"--generations {options.generations}: the run in {run.path} has {finished} finished generations "
                f"already; give more, or rebuild an earlier one: eggroll replay {shlex.quote(str(run.path))} "
                f"--to {options.generations}"
            )
        run.update_config(settings)
        run.note_resume(len(run.updates()), command_line())
        return run

    def _header(self, trainer: EggrollTrainer, run: RunDir, prompts: int) -> None:
        setup, out = trainer.worker.setup, self.console.print
        config = trainer.config
        evolved = sum(spec.size for spec in trainer.evolved)
        out(f"[bold]{escape(setup.name)}[/]  {count(setup.parameters)} parameters, {count(evolved)} evolved in "
            f"{len(trainer.evolved)} tensors, {setup.dtype_name} on {setup.place}")  # fmt: skip
        what = "texts" if trainer.reward.reads == "text" else "prompts"
        each = min(config.prompts_per_generation, prompts)
        out(f"reward {escape(trainer.reward.name)}, {prompts} {what}, {each} a generation")
        out(f"population {config.population_size} ({config.sampling}), rank {config.rank}, sigma {config.sigma:g}, "
            f"lr {config.lr:g}, {config.optimizer}, seed {config.seed}")  # fmt: skip
        for note in setup.notes:
            out(f"[dim]{escape(note)}[/]")
        out(f"[dim]run directory: {escape(str(run.path))}[/]\n")

    def _finish(self, trainer: EggrollTrainer, run: RunDir) -> int:
        directory = run.path / "model"
        if trainer.done == 0 and trainer.interrupted:
            self.console.print("interrupted before the first generation was complete; nothing was saved")
            return 130
        with self.console.status("saving the model ..."):
            trainer.save(directory, metadata={"base_model": self.options.model})
        line = load_line(directory)
        report = write_report(run, load_line=line)
        self._outcome(run)
        self.console.print(f"\nmodel    {escape(str(directory))}\nreport   {escape(str(report))}")
        self.console.print(f"load it  [bold]{escape(line)}[/]")
        if trainer.interrupted:
            self.console.print(
                f"\ninterrupted after generation {trainer.done}; continue with\n"
                f"         eggroll tune {shlex.quote(self.options.model)} --resume {shlex.quote(str(run.path))}"
            )
            return 130
        return 0

    def _outcome(self, run: RunDir) -> None:
        scores = [line["heldout_reward"] for line in run.metrics() if "heldout_reward" in line]
        if len(scores) >= 2:
            self.console.print(f"\nheld-out reward  [bold]{scores[0]:.3f} before, {scores[-1]:.3f} after[/]")
        compared = [row for row in before_and_after(run.samples()) if row.before is not None and row.after is not None]
        rows = [row for row in compared if _text(row.before)[0] != _text(row.after)[0]]
        if not rows:
            return
        title = f"the first of {len(rows)} held-out answers (of {len(compared)}) that changed, with their rewards"
        table = Table(title=title, title_justify="left", expand=True)
        table.add_column("prompt", ratio=2)
        table.add_column("before", ratio=3)
        table.add_column("after", ratio=3)
        for row in rows[:3]:
            table.add_row(_cell(row.prompt, None), _cell(*_text(row.before)), _cell(*_text(row.after)))
        Console(highlight=False).print(table)


def _way_on(run: RunDir, options: TuneOptions) -> str:
    """What is left of a run that failed, and how it goes on."""
    finished = len(run.updates())
    return (
        f"The run in {run.path} is intact, with {finished} finished generation{'' if finished == 1 else 's'}. When the "
        f"cause is gone, continue it: eggroll tune {shlex.quote(options.model)} --resume {shlex.quote(str(run.path))}"
    )


def _one_source(options: TuneOptions) -> str | None:
    """Where training data come from, if it is said."""
    if options.dataset is not None and options.prompts is not None:
        raise ConfigError("--dataset and --prompts mean the same; give one of them")
    return options.dataset or options.prompts


def _load(source: str, options: TuneOptions) -> list[Any]:
    is_text = options.reward in (None, "perplexity") and options.task is None
    check = row_check(options.task or options.reward)
    return load_examples(source, purpose="text" if is_text else "prompts", check=check)


def _check_resumed(run: RunDir, settings: dict[str, Any]) -> None:
    """Refuse changed settings, one line for each, under the names of the command line."""
    # Read as options, so that a run from before an option existed has its default.
    stored = RunDir(run.path, _as_flags(option_dict(options_of_run(str(run.path)))), run.environment)
    stored.check_config(_as_flags(settings["options"]), may_change=[_flag(name) for name in RESUME_FREE])
    before, now = stored.config[_flag("workers")], settings["options"]["workers"]
    if (before is None) != (now is None):
        # Members are computed in ranges there, in larger batches here, and round differently.
        was = "without --workers" if before is None else f"with --workers {before}"
        raise ConfigError(
            f"the run in {run.path} was started {was}. Their number may change on the way, but not whether there are "
            "any: results would differ in the last bits"
        )


def _as_flags(options: dict[str, Any]) -> dict[str, Any]:
    return {_flag(name): value for name, value in options.items() if name != "resume"}


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def _title(options: TuneOptions) -> str:
    return f"{Path(options.model).name} on {options.task or options.reward or 'perplexity'}"


def _text(sample: Any) -> tuple[str, float | None]:
    if isinstance(sample, dict):
        return str(sample.get("completion", "")), sample.get("reward")
    return str(sample), None


def _cell(text: Any, reward: float | None) -> str:
    # What a model writes may hold control characters, which a terminal would obey.
    shown = escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split())))
    return shown if reward is None else f"{shown}  [dim]({reward:.2f})[/]"


def count(parameters: int) -> str:
    """A number of parameters as people say it: 860, 12.3 k, 134.5 M, 8.03 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.4g} {unit}"
    return str(parameters)


__all__: Sequence[str] = ["Session"]
