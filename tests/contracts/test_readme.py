"""README and pages: short enough to finish, the examples are Python, the links lead somewhere, the tree is complete."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def load_tree():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "scripts" / "tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(tree):
    return [row.split()[0] for row in tree.splitlines()]


def test_the_tree_has_every_package():
    module = load_tree()
    page = module.PAGE.read_text(encoding="utf-8")
    assert names(module.split(page)[1]) == names(module.tree()), "run: python scripts/tree.py --write"


def test_every_package_says_what_it_is():
    module = load_tree()
    assert [row for row in module.tree().splitlines() if len(row.split()) < 2] == ["src/"]


def test_the_readme_is_short_and_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\]\((docs/[^)#]+)", readme)) == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_examples_parse(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert missing == []


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) < 100
