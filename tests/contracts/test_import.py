"""What `import eggroll` costs, what it offers, and what no file may do."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "eggroll"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("torch", "jax", "transformers", "datasets", "vllm", "ray", "matplotlib", "tensorboard", "pandas")

# A name here is a promise to users: none may go, and a new one is added here on purpose.
PUBLIC = [
    "CodeExecutionReward",
    "CustomReward",
    "ESConfig",
    "EggrollConfig",
    "EggrollTrainer",
    "FunctionReward",
    "MultiReward",
    "PerplexityReward",
    "TextReward",
    "__version__",
]


def modules_after(statement):
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def imports_of(package):
    root = SOURCE.joinpath(*package.split(".")[1:])
    paths = [path for path in sorted(root.rglob("*.py")) if path.name != "__init__.py"]
    if importlib.util.find_spec("triton") is None:  # Triton kernels need Triton, which not every platform has
        paths = [path for path in paths if not path.stem.endswith("_triton")]
    names = [".".join(("eggroll", *path.relative_to(SOURCE).with_suffix("").parts)) for path in paths]
    assert names, package
    return "\n".join(f"import {name}" for name in names)


def test_import_loads_nothing_heavy():
    assert not modules_after("import eggroll") & {*HEAVY, "numpy"}


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("eggroll.core", HEAVY), ("eggroll.run", HEAVY), ("eggroll.torch", ("jax", "transformers", "datasets", "vllm"))],
)
def test_layers_load_only_their_own_libraries(package, forbidden):
    """Every module of the package, imported: a library is loaded when it is used, not before."""
    assert not modules_after(imports_of(package)) & set(forbidden)


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--help"], ("numpy", "rich", "tyro")),
        (["--version"], ("numpy", "rich", "tyro")),
        (["tune", "--help"], ("tyro",)),
        (["rl", "--help"], ("tyro",)),
    ],
)
def test_help_of_the_command_line_loads_little(words, forbidden):
    """It is there at once: what it does not need is not loaded."""
    statement = "import contextlib, io\nfrom eggroll.cli.main import main\n"
    statement += f"with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): main({words})"
    assert not modules_after(statement) & {*HEAVY, *forbidden}


def test_public_names():
    eggroll = importlib.import_module("eggroll")
    assert sorted(eggroll.__all__) == PUBLIC
    assert dir(eggroll) == PUBLIC
    for name in eggroll.__all__:
        assert getattr(eggroll, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    eggroll = importlib.import_module("eggroll")
    with pytest.raises(AttributeError, match=r"module 'eggroll' has no attribute 'EggrolTrainer'"):
        _ = eggroll.EggrolTrainer


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_the_command_line_prints(path):
    if "cli" in path.relative_to(SOURCE).parts:
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints, f"{path.name} prints in the lines {prints}"


def test_no_file_is_longer_than_500_lines():
    folders = ("tests", "benchmarks", "examples", "recipes")
    files = [*FILES, *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_no_device_is_taken_for_granted():
    offenders = [path.name for path in FILES if re.search(r"""device=["']cuda""", path.read_text(encoding="utf-8"))]
    assert offenders == []


def test_nothing_is_pickled():
    """No checkpoint of ours can run code when it is opened. RWKV's own format is read as data."""
    words = ("import pickle", "pickle.load", "torch.load(", "torch.save(")
    offenders = [path for path in FILES if any(word in path.read_text(encoding="utf-8") for word in words)]
    assert [path.relative_to(SOURCE).as_posix() for path in offenders] == [
        "jax/models/_rwkv7_files.py", "llm/rwkv7/weights.py",
    ]  # fmt: skip
    for path in offenders:
        calls = re.findall(r"torch\.load\((.*)\)", path.read_text(encoding="utf-8"))
        assert calls == ['path, map_location="cpu", weights_only=True, mmap=True']


def test_every_package_is_installed():
    """The list in pyproject.toml, which recipes need (they lie outside of src), against the folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = [".".join(("eggroll", *path.parent.relative_to(SOURCE).parts)) for path in SOURCE.rglob("__init__.py")]
    assert sorted(listed) == sorted([*found, "eggroll.recipes"])
