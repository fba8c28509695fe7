"""rwkv7: an RWKV-7 language model in JAX evolves on a task, with HyperscaleES's noiser, model and update.

    eggroll recipe rwkv7 [--task zeros] [--model CHECKPOINT] [--population 256] [--generations N]

Without a checkpoint, a model with random weights that reads and writes bytes learns to write zeros. A checkpoint is a
``.pth`` file or a Hugging Face directory of RWKV-7; ``--task countdown`` is the paper's (section 6.3).
The scores before and after are those of the center on test problems that the run has not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import eggroll.jax as hs
from eggroll.core.check import numbers, whole
from eggroll.core.fitness import Shaping
from eggroll.errors import ConfigError
from eggroll.lifecycle import Saved, Sitting
from eggroll.llm.tasks import get_task
from eggroll.recipes.common import Options, Recipe, program
from eggroll.recipes.noiser_worker import TESTED, NoiserWorker
from eggroll.run.run_dir import RunDir

RANDOM = {
    "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "decay_low_rank_dim": 16, "a_low_rank_dim": 16,
    "v_low_rank_dim": 8, "gate_low_rank_dim": 16,
}  # fmt: skip
"""The model without a checkpoint: 0.1 million parameters."""


@dataclass(frozen=True, kw_only=True)
class RWKV7Options(Options):
    """An RWKV-7 language model that writes text."""

    population_size: int = 256
    generations: int = 60
    rank: int = 1
    sigma: float = 0.1
    lr: float = 0.05
    fitness_shaping: Shaping = "normalized"
    members_per_forward: int | None = 64
    task: str = "zeros"
    """zeros, countdown, or another task of eggroll tune."""
    model: str | None = None
    """An RWKV-7 checkpoint: .pth or a Hugging Face directory (default: random weights, a byte a token)."""
    vectors: bool = True
    """Evolve norms, biases and mixes too, with dense noise; false is HyperscaleES's freeze_nonlora."""
    prompts: int = 4
    """Problems per generation, the same for all members."""
    max_tokens: int = 16
    """Tokens that are written for each."""
    temperature: float = 1.0
    """Of sampling; 0 takes the likeliest token."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = [*super().problems(), *whole(self, prompts=1, max_tokens=1), *numbers(self, temperature=(0.0, True))]
        if self.target_modules is not None or self.exclude:
            found.append(
                "target_modules and exclude are not for this recipe, in which the model says what evolves; "
                "--no-vectors leaves its vectors alone"
            )
        if self.population_size % 2:
            found.append(f"population_size (={self.population_size}) must be even: the noiser's threads are pairs")
        return found

    @property
    def place_name(self) -> str:
        """The device, for display."""
        return str(self.place().platform)

    def place(self) -> Any:
        """The JAX device.

        Raises:
            ConfigError: there is no such device here.
        """
        kind, _, index = self.device.partition(":")
        try:
            return jax.devices(None if kind == "auto" else kind)[int(index or 0)]
        except (RuntimeError, IndexError, ValueError) as error:
            raise ConfigError(f"--device {self.device}: {str(error).splitlines()[0]}; use cpu or auto") from None


class Bytes:
    """The tokenizer of a model without one: a token is a byte of ASCII."""

    vocab_size = 128

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt."""
        return [list(prompt.encode("ascii", errors="replace")) for prompt in prompts]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return bytes(tokens).decode("ascii")


class Words:
    """The tokenizer of a checkpoint: its own, or that of the World models."""

    def __init__(self, model: str) -> None:
        from eggroll.llm.rwkv7.files import load_tokenizer

        self._tokenizer = load_tokenizer(model if Path(model).is_dir() else None)

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt, as ``eggroll tune`` has them."""
        from eggroll.llm.generation.encode import encode_prompts

        return encode_prompts(self._tokenizer, prompts, 512).input_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def worker(options: RWKV7Options) -> NoiserWorker:
    """The model with its first weights, and what it writes for."""
    model_key, key = jax.random.split(jax.random.key(options.seed % 2**32))
    if options.model is None:
        init = hs.models.rwkv7.RWKV7.rand_init(model_key, vocab_size=Bytes.vocab_size, **RANDOM)
    else:
        init = hs.models.rwkv7.load(options.model)
    tokenizer = Bytes() if options.model is None else Words(options.model)
    return NoiserWorker(options, init, get_task(options.task), tokenizer, key)


def finish(options: RWKV7Options, evolved: NoiserWorker, run: RunDir, sitting: Sitting) -> dict[str, Any]:
    """The score on test problems, after the run and before it."""
    rows = (evolved.task.test or evolved.task.heldout)[:TESTED]
    return {
        "task": evolved.task.name,
        "test_score_before": float(np.mean(worker(options).center(rows)[1])),
        "test_score_after": float(np.mean(evolved.center(rows)[1])),
        "test_problems": len(rows),
    }


def facts(options: RWKV7Options) -> dict[str, str]:
    """What is read: the checkpoint, and a digest of it and of the problems.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    digest = hashlib.sha256(repr([row["prompt"] for row in get_task(options.task).train]).encode())
    if options.model is not None:
        path = Path(options.model)
        if not path.exists():
            raise ConfigError(f"--model {path} does not exist; give an RWKV-7 .pth file or a Hugging Face directory")
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    what = options.model or "random weights, a byte a token"
    return {"model": what, "task": options.task, "sha256": digest.hexdigest()}


def save(evolved: NoiserWorker, directory: Path, generation: int) -> Saved:
    """Write the center as a Hugging Face directory."""
    path = directory / "model"
    hs.models.rwkv7.save(path, evolved.params, evolved.sizes.tree)
    lines = ("import eggroll.jax as hs", f'frozen_params, params, _, _ = hs.models.rwkv7.load("{path}")')
    return Saved("weights", path, lines)


KIND = Recipe("rwkv7", RWKV7Options, worker, finish, eval_every=10, facts=facts, save=save).kind()

if __name__ == "__main__":
    program("rwkv7")
