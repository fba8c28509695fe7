"""What ``make test-extras`` asserts is still true of the extras and commands that there are."""

import importlib.util
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from eggroll.cli.kinds import load_recipe
from eggroll.cli.main import load, options_of
from eggroll.cli.parse import parse
from eggroll.cli.recipe import options_type

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "scripts" / "extras.py").exists():
    pytest.skip("only in the repository", allow_module_level=True)
spec = importlib.util.spec_from_file_location("extras", ROOT / "scripts" / "extras.py")
extras = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extras)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
LINES = {line for lines in extras.CHECKS.values() for line in lines}
TRAINING = sorted(line for line in LINES if line.startswith("eggroll ") and " --help" not in line and " -o " in line)


def test_every_extra_is_tried_or_left_out_with_a_reason():
    tried = {extra for name in extras.CHECKS if name for extra in name.split(",")}
    assert tried | set(extras.LEFT_OUT) == set(EXTRAS)
    assert not tried & set(extras.LEFT_OUT)


def test_what_needs_torch_gets_its_cpu_build():
    """From the default index it comes with gigabytes of CUDA."""

    def has_torch(name):
        lines = EXTRAS[name]
        inner = [line.split("[")[1].split("]")[0] for line in lines if line.startswith("eggroll-evolve[")]
        return any(line.startswith("torch>") for line in lines) or any(map(has_torch, inner))

    for name in extras.CHECKS:
        needs = any(has_torch(extra) for extra in name.split(",") if extra)
        assert (name not in extras.HAS_NO_TORCH) == needs, name


@pytest.mark.parametrize("line", TRAINING)
def test_the_tiny_runs_are_command_lines(line):
    _, command, *arguments = shlex.split(line)
    if command == "recipe":
        options = parse(options_type(load_recipe(arguments[0])), arguments[1:], prog="", description="")
    else:
        options = options_of(load(command), arguments, prog="")
    assert options.output is not None


def test_a_command_that_fails_ends_it(tmp_path, capsys):
    environment = {"PATH": str(Path(sys.executable).parent)}
    extras.run(["python", "-c", "print(1)"], tmp_path, environment)
    with pytest.raises(SystemExit, match="status 3"):
        extras.run(["python", "-c", "print('why'); raise SystemExit(3)"], tmp_path, environment)
    assert "why" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="status 0"):  # a traceback is a fault, whatever the status
        extras.run(["python", "-c", "import sys; print('Traceback', file=sys.stderr)"], tmp_path, environment)
    with pytest.raises(SystemExit, match="there is no program 'no-such-program' on the path"):
        extras.run(["no-such-program"], tmp_path, environment)


def test_a_wrong_name_is_said():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "extras.py"), "nothing"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no check of nothing" in done.stderr
