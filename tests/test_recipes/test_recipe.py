"""``eggroll recipe``: each one from start to end in small, resumed, replayed, and with mistakes that people make."""

import dataclasses
import json
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eggroll.cli import recipe as command
from eggroll.cli.kinds import RECIPES, load_recipe
from eggroll.cli.recipe import options_type
from eggroll.errors import RunError
from eggroll.lifecycle.opening import open_run
from eggroll.recipes import cartpole, common, images, mnist
from eggroll.run.run_dir import RunDir

TRAIN = {"-p": "16", "-g": "3", "--report-to": "none", "--members-per-forward": "8"}
SMALL = {
    "cartpole": TRAIN,
    "mnist": {**TRAIN, "--batch": "8"},
    "mnist_cnn": {**TRAIN, "--batch": "4"},
}
# A flag here is a promise to users: none may go, and a new one is added here on purpose.
SHARED = {field.name for field in dataclasses.fields(common.Options)}
PROMISED = "population_size generations rank sigma lr members_per_forward seed device output resume report_to workers"
FLAGS = {
    "cartpole": SHARED | {"episodes"},
    "mnist": SHARED | {"batch", "data", "backprop"},
    "mnist_cnn": SHARED | {"batch", "data", "backprop"},
    "rwkv7": SHARED | {"task", "model", "vectors", "prompts", "max_tokens", "temperature"},
    "profile": {"population", "batch", "width", "rank", "turns", "device"},
    "hyperscale": {"memory_gib", "rank", "seconds", "device", "output"},
}


def small(name, **more):
    options = SMALL[name] | more
    return [name, *(word for pair in options.items() for word in pair)]


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(images, "_from_hub", lambda: "the hub cannot be reached")


@pytest.mark.parametrize("name", RECIPES)
def test_options_are_frozen_and_documented(name, recipe):
    kind = options_type(load_recipe(name))
    assert {field.name for field in dataclasses.fields(kind)} == FLAGS[name]
    assert set(PROMISED.split()) <= SHARED
    shown = recipe(name, "--help")
    assert shown.status == 0
    assert f"usage: eggroll recipe {name}" in shown.out
    words = " ".join(shown.out.replace("│", " ").split())
    assert load_recipe(name).__doc__.splitlines()[0].split(": ")[1][:30] in words


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_from_start_to_end(name, recipe, tmp_path):
    done = recipe(*small(name), "-o", "out")
    assert (done.status, done.err) == (0, "")
    for text in (f"{name}  ", "parameters evolved, on cpu", "run directory: out", "generation 3/3", "report   out/"):
        assert text in done.out
    run = RunDir.open(tmp_path / "out")
    assert len(run.updates()) == 3
    assert run.config["kind"] == f"recipe {name}"
    assert (tmp_path / "out" / "report.html").exists()
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    if name == "cartpole":
        assert 8 <= result["mean_return"] <= 500
        assert result["generations"] == 3
        # every step of an episode has the reward 1
        assert result["env_steps"] == sum(round(16 * line["fitness_mean"]) for line in run.metrics()[1:])
    else:
        assert "data     digits of scikit-learn, as no MNIST was found (the hub cannot be reached)" in done.out
        assert result["evaluated_samples"] == 16 * 3 * int(SMALL[name]["--batch"])
        assert 0 <= result["test_accuracy"] <= 1


@pytest.mark.parametrize("name", ["cartpole", "mnist"])
def test_a_run_is_resumed_with_its_own_options_and_replayed(name, recipe, tmp_path):
    """Two generations, then two more, against four in one go: the same weights, bit for bit; and again from the log."""
    recipe(*small(name, **{"-g": "4"}), "--seed", "3", "-o", "whole")
    recipe(*small(name, **{"-g": "2"}), "--seed", "3", "-o", "parts")
    if name == "mnist":
        # The schedule depends on the length, so that a run is longer from the start, and was killed.
        recipe(*small(name, **{"-g": "4"}), "--seed", "3", "-o", "killed")
        run = RunDir.open(tmp_path / "killed")
        run.rewind(2)
        more = recipe(name, "--resume", "killed")
        last = "killed"
    else:
        more = recipe(name, "--resume", "parts", "-g", "4")
        last = "parts"
    assert (more.status, more.err) == (0, "")
    checkpoints = [RunDir.open(tmp_path / path).latest_checkpoint().load() for path in ("whole", last)]
    assert checkpoints[0].keys() == checkpoints[1].keys()
    assert all(torch.equal(checkpoints[0][key], checkpoints[1][key]) for key in checkpoints[0])
    replayed = recipe(tmp_path / last, command="replay")
    assert (replayed.status, replayed.err) == (0, "")
    assert "generation 4 of 4, equal to its checkpoint, bit for bit" in replayed.out
    weights = load_file(tmp_path / last / "replay-4" / "model.safetensors")
    network = {"cartpole": cartpole, "mnist": mnist}[name].network()
    network.load_state_dict(weights)
    assert all(torch.equal(weights[key], checkpoints[0][f"parameter/{key}"]) for key in weights)


def test_returns_are_those_of_episodes_played_one_by_one():
    """The vectorised environment against gymnasium's single one from the same first states, pushed right always."""
    import gymnasium

    class Right(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1.0]).expand(len(x), 2)

    states = cartpole.first_states(4, 5)
    assert np.abs(states).max() <= 0.05
    expected = []
    for state in states:
        env = gymnasium.make("CartPole-v1")
        env.reset()
        env.unwrapped.state = np.array(state, dtype=np.float64)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(1)
            total, over = total + reward, terminated or truncated
        expected.append(total)
    assert cartpole.returns(Right(), states, torch.device("cpu")).tolist() == expected
    assert cartpole.returns(Right(), states[2:], torch.device("cpu")).tolist() == expected[2:]


def test_results_do_not_depend_on_how_many_members_are_evaluated_at_once(recipe, tmp_path):
    for members in ("16", "4"):
        recipe(*small("cartpole", **{"--members-per-forward": members, "--episodes": "2"}), "-o", members)
    first, second = (RunDir.open(tmp_path / members).updates() for members in ("16", "4"))
    assert first == second


def test_adam_is_reported_beside(recipe, tmp_path):
    done = recipe(*small("mnist"), "--backprop", "-o", "out")
    assert done.status == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["adam_test_accuracy"] > 0.8
    assert "adam test accuracy" in done.out


def test_profile(recipe):
    done = recipe("profile", "--population", "8", "--batch", "2", "--width", "16", "--turns", "2")
    assert (done.status, done.err) == (0, "")
    parts = ("plain inference, same rows", "draw noise", "forward, Population", "gradients", "members per second")
    for part in (*parts, "JAX: forward, perturb"):
        assert part in done.out


@pytest.mark.slow
def test_hyperscale(recipe, tmp_path, monkeypatch):
    """Full-rank noise of 256 members is 0.26 GiB, so within 0.3 GiB it ends there and EGGROLL goes on."""
    module = load_recipe("hyperscale")
    monkeypatch.setattr(module, "LAST", 1024)
    done = recipe("hyperscale", "--memory-gib", "0.3", "-o", "out")
    assert (done.status, done.err) == (0, "")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["largest_population"] == {"full rank": 256, "at once": 1024, "in parts": 1024}
    curves = result["curves"]
    assert curves["full rank"][0]["gib"] > 0.25
    assert curves["at once"][0]["gib"] < 0.05
    assert (tmp_path / "out" / "memory.png").stat().st_size > 10_000


def test_all_of_them_with_the_options_that_each_knows(recipe, tmp_path, monkeypatch):
    """Everything is checked before the first one starts; here only what would be run is looked at."""
    begun = {}
    monkeypatch.setattr(command, "run", lambda module, options: begun.update({module.__doc__.split(":")[0]: options}))
    done = recipe("all", "--seed", "5", "-o", "out", "--device", "cpu")
    assert (done.status, done.err) == (0, "")
    assert list(begun) == list(RECIPES)
    seeds = {name: options.seed for name, options in begun.items() if hasattr(options, "seed")}
    assert seeds == dict.fromkeys([*SMALL, "rwkv7"], 5)
    assert begun["mnist"].output == "out/mnist"
    assert begun["hyperscale"].output == "out/hyperscale"
    assert all(options.device == "cpu" for options in begun.values())
    assert recipe("all", "--generations", "3").status == 2


def test_without_a_name_the_recipes_are_listed(recipe):
    listed = recipe()
    assert listed.status == 2
    assert recipe("--help").status == 0
    for name in (*RECIPES, "all"):
        assert f"  {name} " in listed.out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["mnits"], "there is no recipe 'mnits'; did you mean 'mnist'?"),
        (["cartpole", "-p", "7"], "population_size (=7) must be even with --sampling antithetic; use 8"),
        (["cartpole", "--sigma", "0", "--rank", "0"], "2 problems"),
        (["mnist", "--data", "nowhere"], "--data nowhere holds no MNIST"),
        (["mnist", "--device", "cuda:7"], "--device cuda:7: "),
        (["cartpole", "--resume", "nowhere"], "nowhere does not exist"),
        (["hyperscale", "--memory-gib", "100000"], "GiB are free"),
    ],
)
def test_mistakes(arguments, text, recipe):
    done = recipe(*arguments)
    assert done.status in (1, 2)
    assert text in " ".join(done.err.split())


def test_a_run_is_continued_only_by_its_own_recipe_and_settings(recipe):
    recipe(*small("cartpole"), "-o", "run")
    for arguments, text in [
        (
            ["mnist", "--resume", "run"],
            "run is a run of eggroll recipe cartpole, so eggroll recipe mnist cannot continue it",
        ),
        (["cartpole", "--resume", "run", "--sigma", "0.5"], "--sigma: 0.2 in the run, 0.5 now Leave them out"),
        (["cartpole", "--resume", "run", "-p", "32"], "--population-size: 16 in the run, 32 now"),
        (["cartpole", "--resume", "run", "-g", "2"], "has 3 finished generations already"),
        ([*small("cartpole"), "-o", "run"], "run already holds a run"),
    ]:
        done = recipe(*arguments)
        assert done.status == 1
        assert text in " ".join(done.err.split())


def test_a_run_is_resumed_only_with_options_that_change_no_result(recipe, tmp_path):
    recipe(*small("mnist"), "-o", "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    refused = recipe("mnist", "--resume", "run", "--batch", "16", "--seed", "1")
    assert refused.status == 1
    assert refused.err == (
        "error: the run in run was started with other settings:\n"
        "  - --seed: 0 in the run, 1 now\n"
        "  - --batch: 8 in the run, 16 now\n"
        "Leave them out, as --resume takes them from the run, or start a new run in another directory (-o). Only "
        "--generations, --members-per-forward, --device, --patience, --report-to, --workers, "
        "--ray-address, --worker-cpus, --worker-gpus, --backprop may change.\n"
    )
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    allowed = ["--members-per-forward", "4", "--device", "cpu", "-g", "4", "--backprop"]
    done = recipe("mnist", "--resume", "run", *allowed)
    assert (done.status, done.err) == (0, "")
    assert RunDir.open(tmp_path / "run").config["options"]["members_per_forward"] == 4
    recipe(*small("cartpole"), "-o", "played")
    refused = recipe("cartpole", "--resume", "played", "--episodes", "2")
    assert refused.status == 1
    assert "--episodes: 1 in the run, 2 now" in refused.err


def test_the_data_of_a_run_stay_the_same(tmp_path):
    """None is how an option is that was not given."""
    options = mnist.MnistOptions(output=str(tmp_path / "run"), device="cpu")
    plan = mnist.KIND.plan(options)
    with ExitStack() as held:
        run = open_run(mnist.KIND, plan, held)
    now = dataclasses.replace(options, resume=str(run.path), data="elsewhere")
    with pytest.raises(RunError, match='--data: not given in the run, "elsewhere" now'):
        open_run(mnist.KIND, dataclasses.replace(plan, options=now), ExitStack())


@pytest.mark.slow
def test_a_recipe_is_a_program_of_its_own(tmp_path):
    for arguments in ([*small("cartpole")[1:], "-o", "out"], ["--resume", "out", "-g", "4"]):
        done = subprocess.run(
            [sys.executable, cartpole.__file__, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "result.json").exists()
    assert len(RunDir.open(tmp_path / "out").updates()) == 4
