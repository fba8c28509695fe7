"""Tiny runs over all commands, and digests of what they leave: the log of updates, the last checkpoint, the models.

Each run is made through the command line in a folder of its own that :func:`prepare` has filled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three.", "Who is it?", "Why?"]
TEXTS = [f"the cat sat on mat number {number}" for number in range(12)]
CHECK = re.compile(rb', "check": "[0-9a-f]{16}"\}$', re.MULTILINE)
SCORE = "def score(text):\n    return -float(sum(map(ord, text)) % 97)\n"


@dataclass(frozen=True)
class Run:
    """A run that is made by ``commands``, in the directory ``run`` of the folder they are called in."""

    name: str
    commands: tuple[str, ...]
    whole: bool = False
    """All its arithmetic is in whole numbers: the digests are the same on every machine."""
    slow: bool = False
    """Takes over ten seconds."""
    replay: int | None = None
    """A generation that is rebuilt at the end, its weights being a digest too."""


def _tune(options: str, more: str = "--prompts prompts.txt -r score.py --dtype float32") -> str:
    small = "-p 4 --rank 1 --max-tokens 4 --batch-size 2 --sigma 0.05 --lr 0.02 -g 3 --optimizer adam"
    return f"tune tiny {small} --device cpu --report-to none -o run {more} {options}"


def _recipe(name: str, options: str) -> str:
    return f"recipe {name} -p 8 -g 3 --members-per-forward 4 --device cpu --report-to none -o run {options}"


def _rl(options: str) -> str:
    small = "--preset paper -p 8 --hidden 8 --layers 1 --max-steps 20 --eval-episodes 4 --eval-every 2 -g 3"
    return f"rl {small} --no-render --report-to none -o run {options}"


def _pretrain(options: str) -> str:
    small = "--pop_size 16 --n_layers 1 --hidden 16 --noise-table-size 65536 --eval-every 2 --eval-tokens 200"
    places = "--sample-length 20 --sample-every 2 --checkpoint-every 2 --threads 1 --device cpu"
    return f"pretrain --data text.txt {small} {places} -g 4 --report-to none -o run {options}"


BF16 = "--prompts prompts.txt -r score.py --dtype bfloat16"
RUNS = [
    Run("tune_adam", (_tune("--eval-prompts held.txt --eval-every 2 --checkpoint-every 2"),), replay=2),
    Run("tune_bf16_masters", (_tune("--optimizer momentum", BF16),), replay=1),
    Run("tune_bf16_stochastic", (_tune("--optimizer sgd --rounding stochastic --lr 2", BF16),)),
    Run("tune_bf16_nearest", (_tune("--optimizer sgd --rounding nearest --lr 2 --rank 2", BF16),)),
    Run("tune_one_sided_elite", (_tune("--sampling one_sided --elite-k 2 -p 5 --batch-members 2"),)),
    Run("tune_normalized", (_tune("--fitness-shaping normalized --optimizer adamw --weight-decay 0.1"),)),
    Run(
        "tune_perplexity",
        (_tune("--eval-prompts texts.txt --max-length 20", "--dataset texts.txt -r perplexity --dtype float32"),),
    ),
    Run(
        "tune_schedules",
        (
            _tune(
                "--vectors --embeddings --exclude o_proj --optimizer sgd --noise-reuse 2 -g 4 --rank 2 --seed 7 "
                "--lr-schedule linear --sigma-schedule cosine --batch-members 2"
            ),
        ),
        replay=3,
    ),
    Run(
        "tune_samples",
        (_tune("--temperature 0.8 --samples-per-prompt 2 --pass-at 2 --eval-prompts held.txt --system 'Be brief.'"),),
    ),
    Run(
        "tune_task",
        (
            _tune(
                "--task zeros -p 16 --max-tokens 48 --temperature 1 --sigma 0.5 --lr-decay 0.9 --sigma-decay 0.9",
                "--dtype float32",
            ),
        ),
    ),
    Run(
        "tune_resumed",
        (
            _tune("-g 2 --eval-prompts held.txt --eval-every 1 --checkpoint-every 1 --target-modules q_proj down_proj"),
            "tune tiny --resume run -g 4",
        ),
        replay=3,
    ),
    Run("tune_workers", (_tune("--workers 2 --eval-prompts held.txt --eval-every 2"),), slow=True),
    Run("recipe_cartpole", (_recipe("cartpole", "--episodes 2"),), replay=2),
    Run(
        "recipe_cartpole_resumed",
        (_recipe("cartpole", "-g 2 --seed 3"), "recipe cartpole --resume run -g 4 --members-per-forward 8"),
    ),
    Run("recipe_mnist_digits", (_recipe("mnist", "--batch 8"),)),
    Run("recipe_mnist_cnn", (_recipe("mnist_cnn", "--batch 4 --data images"),), replay=2),
    Run("rl_adam", (_rl("--env CartPole-v1 --optimizer adam --rank-transform True --episodes 2"),), replay=2),
    Run("rl_preset_sampling", (_rl("--env CartPole-v1 --no-deterministic --no-normalize-obs"),)),
    Run("rl_continuous_adamw", (_rl("--env Pendulum-v1 --optimizer adamw --lr-decay 0.9 --members-per-forward 4"),)),
    Run("rl_openes", (_rl("--env CartPole-v1 --noiser openes --seed 5"),)),
    Run("rl_gymnasium", (_rl("--env gymnasium/CartPole-v1 --rank 1 --episodes 2"),), replay=2),
    Run("rl_env_steps", (_rl("--env CartPole-v1 -g 50 --env-steps 500"),)),
    Run(
        "rl_resumed", (_rl("--env CartPole-v1 -g 2 --optimizer momentum --rank 2"), "rl --resume run -g 4 --no-render")
    ),
    Run("pretrain_table", (_pretrain(""),), whole=True, replay=2),
    Run(
        "pretrain_counter",
        (
            _pretrain(
                "--noise counter --momentum-shift 2 --rank 2 --alpha 0.5 --alpha-schedule exponential --group-size 4 "
                "--noise-reuse 2 --seed 3"
            ),
        ),
        whole=True,
        replay=3,
    ),
    Run("pretrain_normalized", (_pretrain("--fitness normalized --sign-of-noise --pop_size 512 --tokens 4"),)),
    Run("pretrain_resumed", (_pretrain("-g 2"), "pretrain --resume run -g 5 --threads 1"), whole=True),
    Run("pretrain_fp32", (_pretrain("--precision fp32"),), replay=2),
    Run("pretrain_bf16", (_pretrain("--precision bf16 --rank 2 --members-per-forward 8"),)),
]
BY_NAME: Mapping[str, Run] = {run.name: run for run in RUNS}


def prepare(folder: Path, *, model: bool = True) -> Path:
    """Fill ``folder`` with what the runs read: ``tiny/`` (a Llama, if ``model``), texts, a reward, images."""
    if model:
        from tiny_models import write_llama

        write_llama(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "held.txt").write_text("What is blue?\nName a bird.\n")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS))
    (folder / "text.txt").write_text("the cat sat on the mat. " * 400)
    (folder / "score.py").write_text(SCORE)
    write_images(folder / "images")
    return folder


def write_images(folder: Path) -> None:
    """A small MNIST in IDX files: 60 images to train and 20 to test."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        for kind, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            numbers = rng.integers(0, 256 if len(shape) == 3 else 10, shape, dtype=np.uint8)
            head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + numbers.tobytes())


def make(run: Run, folder: Path) -> dict[str, str]:
    """Make a run in the empty ``folder``; returns its digests."""
    prepare(folder, model=run.name.startswith("tune"))
    with contextlib.chdir(folder), _environment(EGGROLL_DATA_DIR=str(folder / "nothing")):
        for command in run.commands:
            call(command)
        if run.replay is not None:
            call(f"replay run --to {run.replay} -o replayed")
    return digests(folder)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def call(command: str) -> str:
    """Call the command line in this process; returns what it printed.

    Raises:
        RuntimeError: its exit status is not 0; the message has what it printed.
    """
    from eggroll.cli.main import main

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            status: Any = main(shlex.split(command))
        except SystemExit as left:
            status = left.code
    if status != 0:
        raise RuntimeError(f"eggroll {command}\nended with status {status}:\n{shown.getvalue()}")
    return shown.getvalue()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of what the run in ``folder / "run"`` left.

    ``updates`` are the bytes of updates.jsonl, apart from the lines' checksums; ``checkpoint`` the tensors of the last
    checkpoint; ``heldout`` the held-out rewards of metrics.jsonl; ``model`` the tensors of the saved model, and
    ``replay`` those of the replayed one, where there are any.
    """
    run = folder / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    heldout = [[line["generation"], line["heldout_reward"]] for line in lines if "heldout_reward" in line]
    found = {
        "updates": hashlib.sha256(CHECK.sub(b"}", (run / "updates.jsonl").read_bytes())).hexdigest(),
        "checkpoint": tensors_digest(checkpoint_file(run)),
        "heldout": hashlib.sha256(json.dumps(heldout).encode()).hexdigest(),
    }
    for name, place in (("model", run / "model"), ("replay", folder / "replayed")):
        if place.exists():
            (file,) = place.glob("*.safetensors")
            found[name] = tensors_digest(file)
    return found


def checkpoint_file(run: Path) -> Path:
    """The file with the tensors of a run's last checkpoint."""
    last = max((run / "checkpoints").iterdir())
    return last / json.loads((last / "manifest.json").read_text())["tensors"]["file"]


def tensors_digest(file: Path) -> str:
    """SHA-256 of a safetensors file's tensors: names, dtypes, shapes and bytes, sorted by name."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    digest = hashlib.sha256()
    for name in sorted(set(header) - {"__metadata__"}):
        entry = header[name]
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        digest.update(content[start:end])
    return digest.hexdigest()
