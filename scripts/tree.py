"""Print the project's tree with one line per package, or write it into docs/architecture.md between its two marks.

    python scripts/tree.py            print it
    python scripts/tree.py --write    update docs/architecture.md (a test fails while it is out of date)

A package's line is the first sentence of its docstring.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: scripts/tree.py --write -->\n```text\n", "```\n<!-- end of tree -->"
WIDTH = 120
COLUMN = 24
FOLDERS = {
    "docs": "one page per task that a user has; dev/log.md is the lab notebook",
    "examples": "ten-minute starts, each under 80 lines",
    "benchmarks": "scripts behind every figure; results/ has what they measured, and on which hardware",
    "tests": "test_<package>/ mirrors src; statistics/, contracts/",
    "scripts": "setup, this tree, and the zoo behind docs/models.md",
}


def summary(package: Path) -> str:
    """The first sentence of a package's docstring."""
    first = (ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return re.split(r"(?<!et al)[.](?=\s+[A-Z]|$)", " ".join(first.split()))[0].replace("``", "")


def line(indent: int, name: str, words: str) -> str:
    """One row of the tree, cut at a word if it is too long."""
    row = f"{'  ' * indent + name:<{COLUMN}} {words}".rstrip()
    return row if len(row) <= WIDTH else row[: WIDTH - 4].rsplit(" ", 1)[0].rstrip(",;:") + " ..."


def rows(package: Path, indent: int) -> Iterator[str]:
    """The rows of a package and of the packages in it."""
    yield line(indent, f"{package.name}/", summary(package))
    for inner in sorted(path.parent for path in package.glob("*/__init__.py")):
        yield from rows(inner, indent + 1)


def tree() -> str:
    """All rows."""
    folders = [line(0, f"{name}/", words) for name, words in FOLDERS.items() if any((ROOT / name).glob("*"))]
    return "\n".join(["src/", *rows(ROOT / "src" / "eggroll", 1), *rows(ROOT / "recipes", 0), *folders]) + "\n"


def split(page: str) -> tuple[str, str, str]:
    """A page's text before, in and after the tree."""
    head, rest = page.split(BEGIN)
    body, tail = rest.split(END)
    return head, body, tail


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        head, _, tail = split(PAGE.read_text(encoding="utf-8"))
        PAGE.write_text(head + BEGIN + tree() + END + tail, encoding="utf-8")
    else:
        sys.stdout.write(tree())
