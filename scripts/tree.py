"""Print the project's tree with one line per file, or write it into README.md between its two marks.

    python scripts/tree.py            print it
    python scripts/tree.py --write    bring README.md up to date (a test fails while it is not)

A Python file's line is the first sentence of its docstring, a page's its title.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- tree: scripts/tree.py --write -->\n```text\n", "```\n<!-- end of tree -->"
WIDTH = 120
COLUMN = 30
FOLDERS = {
    "examples": "ten-minute starts, each under 80 lines",
    "benchmarks": "scripts that measure the speed claims; results/ holds what they measured, and on what",
    "tests": "test_<package>/ mirrors src; statistics/, contracts/",
    "scripts": "set-up, and this tree",
}


def summary(path: Path) -> str:
    """What a file is for, in its own words."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        first = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        return re.split(r"(?<!et al)[.](?=\s+[A-Z]|$)", " ".join(first.split()))[0].replace("``", "")
    title = re.search(r"^# (.*)$", text, re.MULTILINE)
    return title.group(1) if title else ""


def line(indent: int, name: str, words: str) -> str:
    """One row of the tree, cut at a word where it would be too long."""
    row = f"{'  ' * indent + name:<{COLUMN}} {words}".rstrip()
    return row if len(row) <= WIDTH else row[: WIDTH - 4].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def package(folder: Path, indent: int) -> Iterator[str]:
    """The rows of a package: its own, its modules, its packages."""
    init = folder / "__init__.py"
    yield line(indent, f"{folder.name}/", summary(init) if init.exists() else "")
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield line(indent + 1, path.name, summary(path))
    for path in sorted(folder.iterdir()):
        if path.is_dir() and any(path.rglob("*.py")):
            yield from package(path, indent + 1)


def tree() -> str:
    """All rows."""
    rows = ["src/", *package(ROOT / "src" / "eggroll", 1), "docs/"]
    rows += [line(1, path.name, summary(path)) for path in sorted((ROOT / "docs").glob("*.md"))]
    rows += package(ROOT / "recipes", 0)
    rows += [line(0, f"{name}/", words) for name, words in FOLDERS.items() if any((ROOT / name).glob("*"))]
    return "\n".join(rows) + "\n"


def split(readme: str) -> tuple[str, str, str]:
    """README's text before, in and after the tree."""
    head, rest = readme.split(BEGIN)
    body, tail = rest.split(END)
    return head, body, tail


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        head, _, tail = split(README.read_text(encoding="utf-8"))
        README.write_text(head + BEGIN + tree() + END + tail, encoding="utf-8")
    else:
        sys.stdout.write(tree())
