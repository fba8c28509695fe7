"""Run directories of version 0.1.0, kept in ``old_runs``: they are replayed, continued and reported as ever.

Files that can be made again were removed from them: models, reports, pictures. No checkpoint of recipe_mnist is kept,
as its network is large: every 101st of its weights is in ``old_runs/recipe_mnist.safetensors``. pretrain_float was
stopped after 2 of its 4 generations.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from parity.runs import call, checkpoint_file, prepare  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

OLD = Path(__file__).with_name("old_runs")
RESUME = {
    "tune": "tune --resume run -r score.py -g 4",
    "rl": "rl --resume run -g 4 --no-render",
    "rl_gymnasium": "rl --resume run -g 4 --no-render",
    "pretrain": "pretrain --resume run -g 4 --threads 1",
    "pretrain_float": "pretrain --resume run --threads 1",
    "recipe_cartpole": "recipe cartpole --resume run -g 4",
    "recipe_mnist": "recipe mnist --resume run -g 4",
}
NEEDS = {"rl": ("jax", "optax", "gymnax"), "rl_gymnasium": ("jax", "optax", "gymnasium")}
NEEDS |= {"tune": ("transformers",), "recipe_cartpole": ("gymnasium",)}


@pytest.fixture(params=RESUME)
def old(request, tmp_path, monkeypatch):
    """The name of an old run, a copy of which is ``run`` in the folder we are in."""
    for package in NEEDS.get(request.param, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    prepare(tmp_path, model=request.param == "tune")
    shutil.copytree(OLD / request.param, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)


def lines(name):
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]


def stored(old):
    """The weights that the run had, by name and without the prefixes of a checkpoint."""
    file = checkpoint_file(Path("run")) if old != "recipe_mnist" else OLD / "recipe_mnist.safetensors"
    tensors = load_file(file)
    for prefix in ("parameter/", "state/"):
        if any(name.startswith(prefix) for name in tensors):
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return tensors


def test_replay(old):
    done = len(lines("updates.jsonl"))
    shown = call("replay run -o replayed --allow-difference")  # another machine's: compared below
    assert f"generation {done} of {done}" in shown
    (file,) = Path("replayed").glob("*.safetensors")
    replayed, expected = load_file(file), stored(old)
    shared = sorted(set(replayed) & set(expected))
    assert shared
    if old.startswith(("recipe", "pretrain")):
        assert shared == sorted(replayed)
    for name in shared:
        value = replayed[name].flatten()[::101] if old == "recipe_mnist" else replayed[name]
        assert value.dtype == expected[name].dtype
        if value.dtype.is_floating_point:
            size = float(expected[name].abs().max())
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5 * size, msg=name)
        else:
            assert value.equal(expected[name])


def test_resume(old):
    before = lines("updates.jsonl")
    call(f"{RESUME[old]} --report-to none")
    after = lines("updates.jsonl")
    assert after[: len(before)] == before
    assert [line["generation"] for line in after] == [0, 1, 2, 3]
    assert {len(line["shaped_fitness"]) for line in after} == {len(before[0]["shaped_fitness"])}
    assert [line["generation"] for line in lines("metrics.jsonl") if "fitness_mean" in line] == [1, 2, 3, 4]
    assert checkpoint_file(Path("run")).parent.name == "generation-000004"


def test_report(old):
    assert "report.html" in call("report run")
    assert "<html" in Path("run/report.html").read_text()
