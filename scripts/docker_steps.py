"""Run the steps of the Dockerfile's CPU target without Docker: its COPY and RUN lines, in a clean folder.

    python scripts/docker_steps.py                        several minutes, about 3 GB, removed at the end
    python scripts/docker_steps.py --show                 only say what would be run
    python scripts/docker_steps.py --arg EXTRAS=llm,ray   as docker build --build-arg

The image's folders (/src, /opt/eggroll, /work) become folders of the clean one, and the environment has nothing of the
caller's but PATH, HOME and what pip and proxies are configured by. What only a container can do is left out and named:
the base image itself, installing system packages, adding a user, and running as that user. At last, the entry point
is asked for its version and for the help of ``tune``.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = re.compile(r"^(HOME|LANG|PIP_.*|SSL_CERT_.*|(https?|no)_proxy)$", re.IGNORECASE)
SYSTEM = ("apt-get", "useradd")
FOLDERS = ("/src", "/opt/eggroll", "/work")


@dataclass
class Stage:
    """One ``FROM`` and what follows it."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages(text: str) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, with instructions in order; continued lines are joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Stage] = {}
    current = None
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = Stage(name, base)
        elif word and current is not None:
            current.steps.append((word, rest))
    return found


def steps(all_stages: dict[str, Stage], target: str) -> list[tuple[str, str]]:
    """The instructions behind a stage: its base's first, and the stages that it copies from where it does so."""
    stage = all_stages[target]
    found = steps(all_stages, stage.base) if stage.base in all_stages else []
    for word, rest in stage.steps:
        source = re.match(r"--from=(\S+)", rest) if word == "COPY" else None
        if source:
            found = steps(all_stages, source[1]) + found  # the same folder here, so nothing is left to copy
        else:
            found.append((word, rest))
    return found


def placed(text: str, home: Path) -> str:
    """``text`` with the image's folders in ``home``."""
    for folder in FOLDERS:
        text = re.sub(rf"(?<![\w/.]){re.escape(folder)}(?![\w-])", f"{home}{folder}", text)
    return text


def run(target: str, given: dict[str, str], *, show: bool) -> None:
    """Run the steps of ``target``.

    Raises:
        subprocess.CalledProcessError: a step failed; its output has been shown.
    """
    todo = steps(stages((ROOT / "Dockerfile").read_text(encoding="utf-8")), target)
    home = Path(tempfile.mkdtemp(prefix="eggroll-docker-"))
    environment = {name: value for name, value in os.environ.items() if KEPT.match(name)}
    environment["PATH"] = os.environ["PATH"]
    arguments: dict[str, str] = {}
    here = home
    try:
        for word, rest in todo:
            if word in ("RUN", "COPY", "USER") and not show:
                print(f"{word} {rest}", flush=True)
            if word == "WORKDIR":
                here = Path(placed(rest, home))
                here.mkdir(parents=True, exist_ok=True)
            elif word == "ARG":
                name, _, value = rest.partition("=")
                arguments[name] = given.get(name, value)
            elif word == "ENV":
                for name, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                    environment[name] = placed(value, home).replace("$PATH", environment["PATH"])
            elif show:
                print(f"{word} {rest}")
            elif word == "COPY":
                copy(shlex.split(rest), here, home)
            elif word == "RUN" and any(program in rest for program in SYSTEM):
                print("  left out: it changes the system")
            elif word == "RUN":
                command = ["sh", "-euc", placed(rest, home)]
                subprocess.run(command, cwd=here, env=environment | arguments, check=True)
            elif word == "ENTRYPOINT" and not show:
                entry = rest
        if not show:
            for command in ("--version", "tune --help"):
                program = str(home / "opt/eggroll/bin" / shlex.split(entry.strip("[]"))[0])
                subprocess.run([program, *command.split()], env=environment, check=True, stdout=subprocess.DEVNULL)
            print(f"{target}: every step ran; eggroll --version and eggroll tune --help answer")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def copy(words: list[str], here: Path, home: Path) -> None:
    """``COPY``: files and folders of the repository into the image."""
    *sources, target = [word for word in words if not word.startswith("--")]
    goal = here / placed(target, home)
    for source in sources:
        path = ROOT / source
        if path.is_dir():
            shutil.copytree(path, goal, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            into = goal / path.name if target.endswith("/") else goal
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, into)


def main() -> int:
    """Run or show the steps; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", default="cpu", help="the stage (default: cpu)")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="a build argument")
    parser.add_argument("--show", action="store_true", help="only say what would be run")
    options = parser.parse_args()
    try:
        run(options.target, dict(pair.split("=", 1) for pair in options.arg), show=options.show)
    except subprocess.CalledProcessError as error:
        print(f"failed with status {error.returncode}: {error.cmd}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
