"""The pages' examples run, top to bottom, as a reader would paste them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tyro

from eggroll.cli.main import COMMANDS
from eggroll.cli.recipe import RECIPES, load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND_LINES = [
    line
    for page in PAGES
    for line in re.findall(r"^\$ (eggroll .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    if "--resume" not in line  # it reads the run's own settings
]


@pytest.mark.parametrize("page", ["docs/population.md", "docs/functional.md", "docs/trainer.md"])
def test_examples_of_a_page_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, example {number + 1}", "exec"), names)


def test_the_examples_of_modules_in_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    for word in ("Population", "EGGROLL"):
        block = next(block for block in blocks if f"import {word}" in block)
        exec(compile(block, f"README.md, {word}", "exec"), names)
    assert names["y"].shape == (256, 10, 2)
    assert names["accuracy"](names["model"]) >= 0.9


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_understood(line):
    _, command, *arguments = shlex.split(line, comments=True)
    if command == "recipe":
        name, *arguments = arguments
        if name == "all":
            return
        kind = getattr(load(name), RECIPES[name][0])
    else:
        kind, _ = COMMANDS[command]
    assert isinstance(tyro.cli(kind, args=arguments), kind)
