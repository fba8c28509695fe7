"""Build the wheel and the source archive, and try the wheel in a clean environment: base install, then the extra torch.

    make dist      writes dist/; fails if the wheel lacks a file, or a command ends in a traceback

Without torch, ``eggroll --help`` works, and a command that needs more says which extra to install.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from extras import PRETRAIN, TORCH, cpu_builds, run, say, uv_configuration

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
HELP = ("eggroll --help", "eggroll --version", "eggroll runs --help")
NEED_MORE = {"eggroll tune gpt2 -r perplexity": "torch", "eggroll pretrain": "torch", "eggroll rl": "rl"}
"""Commands that want more than the base install, and a word of the line that says so."""


def build(uv: str, environment: dict[str, str]) -> Path:
    """Write ``dist/``; returns the wheel.

    Raises:
        SystemExit: a file of the package is missing in the wheel.
    """
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # what is committed, and nothing that was built here
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
        run([uv, "build", "--quiet", "--python", sys.executable, "--out-dir", str(DIST), folder], ROOT, environment)
    [wheel] = DIST.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    listing = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    missing = [name for name in listing.split() if name.removeprefix("src/") not in held]
    if missing:
        raise SystemExit(f"{wheel.name} lacks {len(missing)} files of src/: {', '.join(missing[:5])}")
    return wheel


def refused(command: str, word: str, folder: Path, environment: dict[str, str]) -> None:
    """Check that a command without its extra ends with a line that names it.

    Raises:
        SystemExit: it does not.
    """
    words = command.split()
    program = shutil.which(words[0], path=environment["PATH"])
    assert program is not None
    done = subprocess.run(
        [program, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    if done.returncode == 0 or "Traceback" in said or "pip install" not in said or word not in said:
        raise SystemExit(f"{command} without its extra: status {done.returncode}, and it says:\n{said[-2000:]}")


def main() -> int:
    """Build and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uv", default="uv", help="the program uv")
    given = parser.parse_args()
    uv = str(Path(shutil.which(given.uv) or given.uv).absolute())
    options, variables = uv_configuration()
    environment = {**os.environ, **variables}
    say("building what is committed")
    wheel = build(uv, environment)
    with tempfile.TemporaryDirectory(prefix="eggroll-wheel-") as name:
        folder = Path(name)
        python = folder / "venv" / "bin" / "python"
        environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
        constraints = ["-c", str(ROOT / "constraints.txt")]
        install = [uv, "pip", "install", "--quiet", "--python", str(python), *options, *constraints]
        run([uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv")], folder, environment)
        say(f"{wheel.name} ({wheel.stat().st_size / 1e6:.1f} MB), base install")
        run([*install, str(wheel)], folder, environment)
        for command in HELP:
            run(command.split(), folder, environment)
        for command, word in NEED_MORE.items():
            refused(command, word, folder, environment)
        say("the same with [torch]")
        cpu = [*cpu_builds(), "torch==2.13.0+cpu"]
        run([*install, *cpu, f"{wheel}[torch]"], folder, environment)
        run(["python", "-c", TORCH], folder, environment)
        (folder / "text.txt").write_text("to be or not to be, that is the question. " * 200, encoding="utf-8")
        run(f"{PRETRAIN} --report-to none".split(), folder, environment)
    for path in sorted(DIST.iterdir()):
        if path.suffix in (".whl", ".gz"):
            say(str(path.relative_to(ROOT)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
