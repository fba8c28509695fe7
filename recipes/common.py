"""What recipes share: their options, and how a module and a fitness function become a run of ``eggroll recipe``."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from eggroll.core.config import ESConfig, ForwardOptions, OptimizerName
from eggroll.distributed import TorchWorker
from eggroll.distributed.options import WorkerOptions
from eggroll.errors import ConfigError
from eggroll.lifecycle import Plan, RunKind, Saved, Sitting
from eggroll.run.options import DeviceOptions, RunOptions
from eggroll.run.run_dir import RunDir

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Parameters of glibc's ``mallopt``."""

console = Console(highlight=False, soft_wrap=True, emoji=False)


@dataclass(frozen=True, kw_only=True)
class Options(WorkerOptions, RunOptions, DeviceOptions, ForwardOptions, ESConfig):
    """What every recipe that trains can be told; each has defaults of its own."""

    members_per_forward: int | None = 256
    optimizer: OptimizerName = "adam"
    seed: int = 0

    @property
    def place_name(self) -> str:
        """The device, for display."""
        return str(self.place())

    def place(self) -> Any:
        """The device: PyTorch's, unless a recipe computes with something else.

        Raises:
            ConfigError: there is no such device here.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            place = torch.device(self.device)
            torch.empty(0, device=place)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {self.device}: {str(error).splitlines()[0]}; use cpu or auto") from None
        return place


@dataclass(frozen=True)
class Recipe:
    """One published result.

    Attributes:
        name: on the command line.
        options: its options, with defaults that reach the result.
        worker: makes the worker, given the options: a ``TorchWorker``, or one that has ``num_evolved``, the parameters
            that it evolves.
        finish: ``finish(worker, run, sitting)`` gives what is in ``result.json``.
        eval_every: generations between held-out scores.
        stop: asked after each generation, given the metrics of all that are done; true ends the run.
        facts: more lines about the run: what is read, by name. ``sha256`` is a digest of it, which a resumed run must
            have again.
        save: ``save(worker, directory, generation)`` writes a replayed worker's weights; those of a ``TorchWorker`` are
            written without it.
    """

    name: str
    options: type[Options]
    worker: Callable[[Any], Any]
    finish: Callable[[Any, Any, RunDir, Sitting], dict[str, Any]]
    eval_every: int
    stop: Callable[[list[dict[str, Any]]], bool] | None = None
    facts: Callable[[Any], Mapping[str, str]] = lambda options: {}
    save: Callable[[Any, Path, int], Saved] | None = None

    def kind(self) -> RunKind:
        """The kind of run that ``eggroll recipe NAME`` starts."""
        return RunKind(
            name=f"recipe {self.name}",
            options=self.options,
            plan=self._plan,
            base=lambda options, run: self.worker(options),
            save=self.save or self._save,
        )

    def _plan(self, options: Any) -> Plan:
        _keep_freed_memory()
        facts = self.facts(options)

        def describe(worker: Any) -> list[str]:
            if isinstance(worker, TorchWorker):
                evolved = sum(spec.size for spec in worker.replica.population.specs)
            else:
                evolved = getattr(worker, "num_evolved", None)
            size = f"{evolved} parameters evolved, on {options.place_name}"
            return [
                *(f"{name:8} {text}" for name, text in facts.items()),
                f"[bold]{self.name}[/]  {size if evolved else f'on {options.workers} workers'}",
                f"population {options.population_size} ({options.sampling}), rank {options.rank}, sigma "
                f"{options.sigma:g}, lr {options.lr:g}, {options.optimizer}, seed {options.seed}",
            ]

        def finish(worker: Any, run: RunDir, sitting: Sitting) -> dict[str, Any]:
            seconds = sum(line["evaluate_s"] + line["update_s"] for line in trained(run))
            return {"recipe_s": round(seconds, 2), **self.finish(options, worker, run, sitting)}

        return Plan(
            options=options,
            config=options,
            make_worker=lambda: self.worker(options),
            finish=finish,
            title=self.name,
            name=self.name,
            eval_every=self.eval_every,
            checkpoint_every=max(1, options.generations // 10),
            stop=self.stop,
            describe=describe,
            facts={"model": self.name, "device": options.place_name, **facts},
            fingerprints={"data_fingerprint": facts["sha256"]} if "sha256" in facts else {},
        )

    def _save(self, worker: TorchWorker, directory: Path, generation: int) -> Saved:
        path = directory / "model.safetensors"
        save_file({name: value.contiguous() for name, value in worker.model.state_dict().items()}, path)
        lines = (
            f"from eggroll.recipes.{self.name} import network",
            "from safetensors.torch import load_file",
            f'model = network(); model.load_state_dict(load_file("{path}"))',
        )
        return Saved("weights", path, lines)


def trained(run: RunDir) -> list[dict[str, Any]]:
    """The metrics of every generation, those before a resume included."""
    return [line for line in run.metrics() if "fitness_mean" in line]


def program(name: str) -> None:
    """A recipe as a program of its own: the command line of ``eggroll recipe NAME``."""
    from eggroll.cli.main import main

    sys.exit(main(["recipe", name, *sys.argv[1:]]))


def _keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next generation.

    By default glibc gives large blocks back to the system, which then hands out the same memory again page by page: a
    third of the time of small networks.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # no glibc
    for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**30), (M_TOP_PAD, 2**26)):
        mallopt(parameter, value)
