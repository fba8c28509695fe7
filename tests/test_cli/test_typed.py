"""Printed command lines work as printed, and a command whose extra is missing says so in a sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eggroll import _optional
from eggroll._command import typed

ROOT = Path(__file__).parents[2]


def _program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment in ``.venv`` of the current directory that is not activated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "src/eggroll/cli/main.py")])
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    _program(tmp_path / ".venv/bin/eggroll")
    return tmp_path


class TestTyped:
    def test_not_activated(self, environment):
        assert typed() == ".venv/bin/eggroll"

    def test_activated(self, environment, monkeypatch):
        monkeypatch.setenv("PATH", str(environment / ".venv/bin"))
        assert typed() == "eggroll"

    def test_a_link_on_the_path_is_the_same(self, environment):
        (environment / "elsewhere").mkdir()
        (environment / "elsewhere/eggroll").symlink_to(environment / ".venv/bin/eggroll")
        assert typed() == "eggroll"

    def test_another_environment_is_on_the_path(self, environment):
        _program(environment / "elsewhere/eggroll")
        assert typed() == ".venv/bin/eggroll"

    def test_from_another_directory(self, environment, monkeypatch):
        (environment / "my work").mkdir()
        monkeypatch.chdir(environment / "my work")
        assert typed() == f"{environment}/.venv/bin/eggroll"
        monkeypatch.setattr(sys, "executable", str(environment / "my work/.venv/bin/python"))
        _program(environment / "my work/.venv/bin/eggroll")
        monkeypatch.chdir("/")
        assert typed() == f"'{environment}/my work/.venv/bin/eggroll'"

    def test_in_the_home_of_a_user(self, environment, monkeypatch):
        """``pip install --user`` puts it elsewhere than beside Python."""
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
        script = _program(environment / "local/bin/eggroll")
        monkeypatch.setattr(sys, "argv", [str(script)])
        assert typed() == "local/bin/eggroll"

    def test_not_installed(self, environment):
        (environment / ".venv/bin/eggroll").unlink()
        assert typed() == ".venv/bin/python -m eggroll.cli.main"

    def test_pip(self, environment, monkeypatch):
        assert typed("pip") == "pip"  # uv makes environments without one
        _program(environment / ".venv/bin/pip")
        assert typed("pip") == ".venv/bin/pip"
        assert _optional.install_line("llm").startswith(".venv/bin/pip install ")


def test_a_printed_line_works_as_printed():
    if not Path(sys.executable).with_name("eggroll").exists():
        pytest.skip("eggroll is not installed here")
    shell = {**os.environ, "PATH": "/usr/bin:/bin"}
    found = subprocess.run(
        [sys.executable, "-m", "eggroll.cli.main", "eval"],
        capture_output=True, text=True, env=shell, cwd=ROOT, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    command = found.stderr.partition("and a task: ")[2].strip()
    assert command.endswith(" eval smollm2-135m --task countdown")
    assert "/" in command
    again = ["sh", "-c", command.replace("eval smollm2-135m --task countdown", "--version")]
    version = subprocess.run(again, capture_output=True, text=True, env=shell, cwd=ROOT, check=True)
    assert version.stdout == "eggroll 0.1.0\n"


WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from eggroll.cli.main import main
for words in ("tune m --task zeros", "info m", "eval m --task zeros", "pretrain --data x.txt", "recipe cartpole"):
    print(main(words.split()), file=sys.stderr)
"""


def test_without_torch():
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    lines = found.stderr.splitlines()
    for command in ("tune", "info", "eval", "pretrain"):
        assert lines[:2] == [
            f"error: 'eggroll {command}' needs torch, which is not installed. Install it with: "
            f"{_optional.install_line('llm')}",
            "1",
        ]
        lines = lines[2:]
    assert "Traceback" not in found.stderr
    assert len(lines) == 2
    assert lines[0].endswith(f"Install it with: {_optional.install_line('recipes')}")


def test_a_module_that_no_extra_brings_is_a_fault(monkeypatch):
    from eggroll.cli import main

    def fail(name):
        raise ModuleNotFoundError("No module named 'eggroll.nothing'", name="eggroll.nothing")

    monkeypatch.setattr(main, "load", fail)
    with pytest.raises(ModuleNotFoundError):
        main.main(["tune", "m"])
