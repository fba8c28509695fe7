"""Try each extra as a user has it: a clean environment with nothing else, ``--help``, and one tiny run.

    make test-extras                                all of them: some gigabytes and half an hour
    make test-extras EXTRAS="rl jax"                some
    make test-extras EXTRAS=rl RESOLUTION=lowest-direct   with the oldest releases that pyproject.toml allows
    make test-extras EXTRAS=rl RESOLUTION=tested    with those of constraints.txt

What is committed is installed. torch is the CPU build. Nothing is downloaded but packages: language models are made
from a configuration.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY_LLAMA = "import sys; sys.path.insert(0, {tests!r}); from tiny_models import write_llama; write_llama('tiny')"
TUNE = (
    "eggroll tune tiny --reward score.py --prompts prompts.txt --population 4 --generations 2 --max-tokens 4 "
    "--batch-size 2 -o tuned"
)
PRETRAIN = "eggroll pretrain --data text.txt --population 8 --generations 2 --hidden 16 --n-layers 1 -o pretrained"
RL = (
    "eggroll rl --env CartPole-v1 --population 8 --generations 2 --max-steps 20 --hidden 8 --layers 1 "
    "--eval-episodes 2 -o policy"
)
JAX = """
import jax.numpy as jnp
from eggroll import ESConfig
from eggroll.jax import Strategy
strategy = Strategy(lambda w, x: (x @ w).sum(), ESConfig(population_size=4, generations=1))
state, scores = strategy.step(strategy.init(jnp.ones((3, 2))), jnp.ones((1, 3)))
assert scores.shape == (4,), scores.shape
"""
TORCH = """
import torch
from eggroll.torch import Population
model = torch.nn.Linear(3, 2).eval()
with Population(model, population_size=4).perturbed(generation=0) as members:
    assert members.split(model(members.expand(torch.ones(1, 3)))).shape == (4, 1, 2)
"""
QUANTIZED = """
import bitsandbytes, torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from eggroll.torch import Population
from eggroll.torch.quantized.adopt import adopt
four_bits = bitsandbytes.nn.Linear4bit(64, 64, quant_type='nf4').to('cpu')
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval()
quantize_(model, Int8WeightOnlyConfig())
model.append(four_bits)
assert adopt(model) == 2
assert Population(model, population_size=4).forward(torch.ones(4, 64), generation=0).shape == (4, 64)
"""
JUDGE = """
from eggroll.llm import JudgeReward
from eggroll.llm.rewards import UNSCORED
reward = JudgeReward('http://127.0.0.1:9/v1', 'nobody', retries=0)
assert reward.score(['question'], ['answer'])[0] is UNSCORED, 'nobody listens there'
"""
CHECKS: dict[str, list[str]] = {
    "": ["eggroll --help", "eggroll --version"],
    "torch": ["eggroll pretrain --help", f"python -c {shlex.quote(TORCH)}", f"{PRETRAIN} --report-to none"],
    "llm": ["eggroll tune --help", "eggroll info --help", TINY_LLAMA, "eggroll info tiny", TUNE, PRETRAIN],
    "recipes": [
        "eggroll recipe --help",
        "eggroll recipe cartpole --population 8 --generations 2 -o cartpole",
        "eggroll recipe rwkv7 --population 4 --generations 1 --prompts 1 --max-tokens 2 -o rwkv7",
    ],
    "jax": [f"python -c {shlex.quote(JAX)}"],
    "rl": ["eggroll rl --help", "eggroll rl --list", RL, "eggroll replay policy"],
    "kinetix": ["eggroll rl --list", RL],
    "tasks": ["eggroll eval --help", TINY_LLAMA, "eggroll eval tiny --task countdown --max-tokens 4"],
    "judge": [f"python -c {shlex.quote(JUDGE)}"],
    "quantized": [f"python -c {shlex.quote(QUANTIZED)}"],
    "llm,ray": [TINY_LLAMA, f"{TUNE} --workers 1"],
    "torch,report": [f"{PRETRAIN} --report-to none", "eggroll report pretrained", "eggroll runs ."],
    "torch,wandb": [f"{PRETRAIN} --report-to wandb"],
    "torch,trackio": [f"{PRETRAIN} --report-to trackio", "trackio list projects"],
}
"""What is tried in each environment; ``""`` is the package without extras. A command that fails ends the script."""
LEFT_OUT = {
    "vllm": "make test-vllm has an environment of its own",
    "grpo": "what it adds is only compared with, in benchmarks/grpo",
    "rwkv": "one package, of which a file is read",
    "dev": "make test",
    "docs": "make docs",
    "notebook": "make notebook",
    "semantic": "tests/test_examples: the extra is a model, and 91 MB",
}
HAS_NO_TORCH = ("", "jax", "rl", "kinetix")
FILES = {
    "score.py": "def score(text):\n    return -float(len(text))\n",
    "prompts.txt": "Say hi.\nWhy?\n",
    "text.txt": "to be or not to be, that is the question. " * 200,
}


def main() -> int:
    """Try what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help=f"of: {', '.join(name or 'none' for name in CHECKS)}")
    parser.add_argument("--resolution", default="highest", choices=("highest", "lowest-direct", "tested"))
    parser.add_argument("--uv", default="uv", help="the program uv")
    given = parser.parse_args()
    wanted = ["" if name == "none" else name for name in given.extras] or list(CHECKS)
    unknown = [name for name in wanted if name not in CHECKS]
    if unknown:
        parser.error(f"there is no check of {', '.join(unknown)}; there are: {', '.join(CHECKS)}")
    for extra in wanted:
        with tempfile.TemporaryDirectory(prefix="eggroll-extra-") as folder:
            check(extra, Path(folder), str(Path(shutil.which(given.uv) or given.uv).absolute()), given.resolution)
    return 0


def check(extra: str, folder: Path, uv: str, resolution: str) -> None:
    """Install one extra in a new environment below ``folder``, and run its commands there.

    Raises:
        SystemExit: a command fails; its output has been shown.
    """
    options, variables = uv_configuration()
    environment = {**os.environ, **variables}
    python = folder / "venv" / "bin" / "python"
    say(f"{extra or 'no extra'}: installing ({resolution})")
    run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], folder, environment)
    # A copy of what git has, so that nothing built here gets in, and nothing built there stays.
    source = folder / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", str(source)], input=archive, check=True)
    chosen = ["-c", str(ROOT / "constraints.txt")] if resolution == "tested" else [f"--resolution={resolution}"]
    if extra not in HAS_NO_TORCH:
        chosen += cpu_builds()
        build = ["torch>=2.6,<3"] if resolution != "tested" else ["torch==2.13.0+cpu"]
        run([uv, "pip", "install", "--quiet", "--python", str(python), *options, *chosen, *build], folder, environment)
    target = f"{source}[{extra}]" if extra else str(source)
    run([uv, "pip", "install", "--quiet", "--python", str(python), *options, *chosen, target], folder, environment)
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    environment |= {"PATH": f"{python.parent}{os.pathsep}{environment['PATH']}", "WANDB_MODE": "offline"}
    environment["TRACKIO_DIR"] = str(folder / "trackio")
    environment |= {"HF_HUB_OFFLINE": "1", "XDG_STATE_HOME": str(folder / "state")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    for line in CHECKS[extra]:
        words = words_of(line)
        say(f"{extra or 'no extra'}: {' '.join(words[:6])} ...".replace("\n", " "))
        run(words, folder, environment)


def cpu_builds() -> list[str]:
    """uv's option for the PyTorch project's CPU wheels; none where only pip's own sources can be reached."""
    try:
        socket.create_connection(("download.pytorch.org", 443), timeout=5).close()
    except OSError:
        return []
    return ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


def words_of(line: str) -> list[str]:
    """A check's words; the model is made by Python, with the tests' own function."""
    if line == TINY_LLAMA:
        return ["python", "-c", line.format(tests=str(ROOT / "tests"))]
    return shlex.split(line)


def uv_configuration() -> tuple[list[str], dict[str, str]]:
    """pip's configuration as uv's options and variables."""
    spec = importlib.util.spec_from_file_location("uv_options", ROOT / "scripts" / "uv_options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    lines = module.options(module.settings(listing.stdout), dict(os.environ))
    variables = dict(line.split("=", 1) for line in lines if not line.startswith("--"))
    return [line for line in lines if line.startswith("--")], variables


def run(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command; its output is shown if it fails or ends in a traceback."""
    # found on the new path, not on that of this process
    program = shutil.which(words[0], path=environment["PATH"])
    if program is None:
        raise SystemExit(f"there is no program {words[0]!r} on the path")
    done = subprocess.run(
        [program, *words[1:]], check=False, cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode or "Traceback" in done.stderr:
        print(done.stdout[-4000:], done.stderr[-8000:], sep="\n")
        raise SystemExit(f"failed with status {done.returncode}: {shlex.join(words)}")


def say(text: str) -> None:
    """A line of progress."""
    print(f"[extras] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
