"""A kind of run that needs nothing but NumPy, for tests of what is the same for all kinds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eggroll import lifecycle
from eggroll.core.config import ESConfig
from eggroll.core.threefry import NOISE_VERSION
from eggroll.distributed.options import WorkerOptions
from eggroll.lifecycle import Plan, RunKind, Saved, Trained
from eggroll.loop import Evaluation, Heldout
from eggroll.run.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class ToyOptions(WorkerOptions, RunOptions, ESConfig):
    """What a toy can be told."""

    data: str | None = None
    """A file that is read."""
    population_size: int = 4
    rank: int = 1
    generations: int = 3
    report_to: str = "none"


class Toy:
    """Four numbers that shall become small."""

    def __init__(self, options: ToyOptions) -> None:
        self.options, self.weights = options, np.ones(4, np.float32)

    def _noise(self, generation: int) -> Any:
        size = (self.options.population_size // 2, 4)
        half = np.random.default_rng((self.options.seed, generation)).standard_normal(size)
        return np.stack([half, -half], axis=1).reshape(-1, 4).astype(np.float32)

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        found = self.weights + sigma * self._noise(generation)[members.start : members.stop]
        row = {"member": 0, "prompt": "p", "completion": str(found[0]), "reward": 1.0}
        return Evaluation(-np.sum(found**2, axis=1), samples=[row], totals={"steps": len(members)})

    def heldout(self, generation: int) -> Heldout:
        return Heldout(-float(np.sum(self.weights**2)))

    def apply(self, record: Any) -> float:
        self.weights = self.weights + np.float32(record.lr) * record.weights @ self._noise(record.generation)
        return 1.0

    def state_tensors(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        self.weights = np.array(tensors["weights"], np.float32)


def _plan(options: ToyOptions) -> Plan:
    return Plan(
        options=options,
        config=options,
        make_worker=lambda: Toy(options),
        title="toy",
        name="toy",
        eval_every=1,
        checkpoint_every=1,
        fingerprints={} if options.data is None else {"data_fingerprint": Path(options.data).read_text()},
    )


def _save(worker: Toy, directory: Path, generation: int) -> Saved:
    np.save(directory / "weights.npy", worker.weights)
    return Saved("weights", directory / "weights.npy", [])


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Without what takes most of a toy's time: its report, and what the machine says about itself."""

    def about(command: Any = None) -> dict[str, Any]:
        return {"command": list(command or ()), "noise_version": NOISE_VERSION}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eggroll.lifecycle.training.write_report", lambda *_, **__: None)
        patch.setattr("eggroll.run.provenance.environment", about)
        yield


KIND = RunKind(name="toy", options=ToyOptions, plan=_plan, base=lambda options, run: Toy(options), save=_save)


def train(**options: Any) -> Trained:
    """A new toy."""
    return lifecycle.train(KIND, ToyOptions(**options))


def resume(path: Path, **changes: Any) -> Trained:
    """A toy goes on."""
    return lifecycle.train(KIND, dataclasses.replace(lifecycle.resumed_options(KIND, path), **changes))
