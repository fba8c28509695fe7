"""``eggroll replay``: the weights of any generation, from the base model and the run's log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.markup import escape

from eggroll.errors import CheckpointError

if TYPE_CHECKING:
    from eggroll.loop import Learner
    from eggroll.run.run_dir import RunDir


@dataclass(frozen=True)
class ReplayOptions:
    """What ``eggroll replay`` can be told."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run directory."""
    to: int | None = None
    """The generation to rebuild (default: the last one in the log; 0 is the base model)."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where the model goes (default: RUN/replay-<generation>)."""


def replay(options: ReplayOptions) -> int:
    """Rebuild the weights of a generation from the base model and the run's log."""
    from eggroll.run.run_dir import RunDir

    console = Console(soft_wrap=True, highlight=False)
    run = RunDir.open(options.run)
    if run.config.get("kind") == "rl":
        return _replay_rl(run, options, console)
    if run.config.get("kind") == "pretrain":
        return _replay_pretrain(run, options, console)
    return _replay_recipe(run, options, console) if "recipe" in run.config else _replay_tune(run, options, console)


def _replay_pretrain(run: RunDir, options: ReplayOptions, console: Console) -> int:
    """A language model of ``eggroll pretrain``, made again from its seed."""
    from safetensors.torch import save_file

    from eggroll.pretrain.trainer import learner_of_run

    learner = learner_of_run(str(run.path))
    done = _apply(run, learner, options, console)
    directory = Path(options.output) if options.output else run.path / f"replay-{done}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.safetensors"
    tensors = dict(learner.state_tensors())
    save_file(learner.weights(), path)
    console.print(f"generation {done} of {len(run.updates())}{_compared(run, tensors, done)}")
    console.print(f'weights  {escape(str(path))}\nload it  [bold]safetensors.numpy.load_file("{escape(str(path))}")[/]')
    return 0


def _replay_rl(run: RunDir, options: ReplayOptions, console: Console) -> int:
    """A policy, made again from its seed; the statistics of its observations are those of the newest checkpoint."""
    from safetensors.numpy import save_file

    from eggroll.rl.trainer import learner_of_run

    learner = learner_of_run(run)
    done = _apply(run, learner, options, console)
    directory = Path(options.output) if options.output else run.path / f"replay-{done}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "policy.safetensors"
    weights = {name: value for name, value in learner.state_tensors().items() if name.startswith("state/params/")}
    newest = run.latest_checkpoint()
    kept = {} if newest is None else {k: v for k, v in newest.load().items() if k.startswith("stats/")}
    save_file({name.removeprefix("state/"): value for name, value in {**weights, **kept}.items()}, path)
    console.print(f"generation {done} of {len(run.updates())}{_compared(run, weights, done)}")
    console.print(f"policy   {escape(str(path))}")
    console.print(f'load it  [bold]safetensors.numpy.load_file("{escape(str(path))}")[/]')
    return 0


def _replay_recipe(run: RunDir, options: ReplayOptions, console: Console) -> int:
    """A recipe's network, made again from its seed."""
    from safetensors.torch import save_file

    from eggroll.cli.recipe import replica_of_run

    replica = replica_of_run(run)
    done = _apply(run, replica, options, console)
    directory = Path(options.output) if options.output else run.path / f"replay-{done}"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "model.safetensors"
    save_file({name: value.contiguous() for name, value in replica.model.state_dict().items()}, path)
    console.print(f"generation {done} of {len(run.updates())}{_compared(run, replica.state_tensors(), done)}")
    lines = (
        f"from eggroll.recipes.{run.config['recipe']} import network",
        "from safetensors.torch import load_file",
        f'model = network(); model.load_state_dict(load_file("{path}"))',
    )
    console.print(f"weights  {escape(str(path))}\nload it  [bold]{escape(lines[0])}[/]")
    for line in lines[1:]:
        console.print(f"         [bold]{escape(line)}[/]")
    return 0


def _apply(run: RunDir, replica: Learner, options: ReplayOptions, console: Console) -> int:
    """Take the updates of the run's log; returns how many there were."""
    from rich.progress import track

    from eggroll.core.records import UpdateRecord
    from eggroll.run.replay import replay_run

    records: list[UpdateRecord] = []
    done = replay_run(run, records.append, to=options.to)
    for record in track(records, description="replaying", console=console, disable=not console.is_terminal):
        replica.apply(record)
    return done


def _replay_tune(run: RunDir, options: ReplayOptions, console: Console) -> int:
    """A language model's run, from the base model."""
    from eggroll.cli.tune import options_of_run
    from eggroll.llm.backends.torch import replica_for
    from eggroll.llm.models import loading
    from eggroll.llm.models.export import load_line, save_pretrained

    settings = options_of_run(options.run)
    with console.status(f"loading {settings.model} ..."):
        loaded = loading.load(settings.model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
    replica = replica_for(loaded.model, settings.config())
    done = _apply(run, replica, options, console)
    directory = Path(options.output) if options.output else run.path / f"replay-{done}"
    save_pretrained(loaded.model, loaded.tokenizer, directory, metadata={"replayed_generations": done})
    console.print(f"generation {done} of {len(run.updates())}{_compared(run, replica.state_tensors(), done)}")
    console.print(f"model    {escape(str(directory))}\nload it  [bold]{escape(load_line(directory))}[/]")
    return 0


def _compared(run: RunDir, tensors: Mapping[str, Any], generation: int) -> str:
    """Whether the weights equal those of a checkpoint, if there is one of this generation."""
    from eggroll.run.checkpoint import found, read

    path = dict(found(run.checkpoints)).get(generation)
    if path is None:
        return ""
    try:
        stored = read(path).load()
    except CheckpointError as error:
        return f", not compared with its checkpoint, which is damaged: {escape(str(error))}"
    if all(name in stored and _same(stored[name], tensor) for name, tensor in tensors.items()):
        return ", equal to its checkpoint, bit for bit"
    return ", [red]differs from its checkpoint[/] (another kind of machine, or another number of threads?)"


def _same(one: Any, other: Any) -> bool:
    """Whether two arrays, of NumPy or of PyTorch, are equal."""
    return bool(one.equal(other.cpu()) if hasattr(one, "equal") else (one == other).all())
