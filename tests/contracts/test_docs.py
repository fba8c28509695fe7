"""The pages' examples run, top to bottom, as a reader would paste them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny_models import write_llama

from eggroll.cli.kinds import load_recipe
from eggroll.cli.main import load as load_command
from eggroll.cli.main import options_of
from eggroll.cli.parse import parse
from eggroll.cli.recipe import AllOptions, options_type
from eggroll.cli.watch import option_given
from eggroll.llm import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND_LINES = [
    line
    for page in PAGES
    for line in re.findall(r"^\$ (eggroll .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if "--resume" not in line  # it reads the run's own settings
]


def examples(page):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def accuracy_of_members(names):
    return float(names["scores"].mean())


def accuracy_of_center(names):
    return float(names["fitness"](names["state"].params, names["x"]))


LEARNED = {"docs/functional.md": accuracy_of_members, "docs/jax.md": accuracy_of_center}
"""Pages whose first example says that it learns: half of the answers are right by chance."""


@pytest.mark.parametrize(
    "page",
    [
        "docs/population.md",
        "docs/functional.md",
        "docs/trainer.md",
        "docs/pretrain.md",
        "docs/start.md",
        "docs/resume.md",
        pytest.param("docs/jax.md", marks=pytest.mark.slow),
    ],
)
def test_examples_of_a_page_run(page):
    blocks = examples(page)
    assert blocks
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, example {number + 1}", "exec"), names)
        if number == 0 and page in LEARNED:
            assert LEARNED[page](names) > 0.9
    if page == "docs/start.md":
        assert names["accuracy"] > 0.85


def test_the_example_of_the_readme_runs(monkeypatch, tmp_path, capsys):
    """As printed, but with a tiny model and two generations."""
    (block,) = examples("README.md")
    source = write_llama(tmp_path / "tiny", vocab_size=300)
    block = block.replace('load("smollm2-135m")', f"load({str(source)!r}, dtype='float32')")
    block, count = re.subn(r"generations=\d+, max_tokens=\d+", "generations=2, max_tokens=24", block)
    assert count == 1
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.strip() == f"[{names['history'][0]['fitness_mean']:.1f}]"
    before, after = (
        load(str(path), dtype="float32").model.state_dict() for path in (source, tmp_path / "twelve-words")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_understood(line, tmp_path, monkeypatch):
    settings = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/tune.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "run.yaml").write_text(settings[1])
    monkeypatch.chdir(tmp_path)
    _, command, *arguments = shlex.split(line, comments=True)
    if command == "recipe":
        name, *arguments = arguments
        kind = AllOptions if name == "all" else options_type(load_recipe(name))
        assert isinstance(parse(kind, arguments, prog=name, description=""), kind)
    else:
        module = load_command(command)
        assert isinstance(options_of(module, arguments, prog=command), module.OPTIONS)


ENVIRONMENTS = {option_given(shlex.split(line, comments=True), "--env") for line in COMMAND_LINES} - {None}


@pytest.mark.parametrize("name", sorted(ENVIRONMENTS))
def test_environments_of_the_guide_come_with_the_extra(name):
    """One that needs another package, such as Box2D, would be the first thing that fails."""
    worker = pytest.importorskip("eggroll.rl.worker")
    assert worker.environment_of(name).obs_size > 0
