"""Build the documentation's site and check every link in it.

    python scripts/site.py     writes build/site; fails if a page, a picture or a section is missing

Zensical (strict) renders ``docs/`` as ``mkdocs.yml`` says. Pictures that stand beside the results they show, outside of
``docs/``, are then copied into the site. At last every ``href`` and ``src`` of every page is followed, with sections.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "site"
OUTSIDE = "../benchmarks/"
"""How pages of ``docs/`` name pictures that are not in it."""


class Page(HTMLParser):
    """What a page refers to, and the names of its sections."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.sections: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element's links and its name."""
        for name, value in attrs:
            if name in ("href", "src") and value is not None:
                self.targets.add(value)
            elif name == "id" and value is not None:
                self.sections.add(value)


def bring_pictures(site: Path, root: Path) -> int:
    """Copy pictures from outside of ``docs/`` into ``site`` and point the pages to them; returns how many."""
    copied = set()
    for path in site.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for target in Page(text).targets:
            source = root / target.removeprefix("../")
            if target.startswith(OUTSIDE) and source.is_file():
                inside = "assets/" + target.removeprefix("../")
                (site / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, site / inside)
                text = text.replace(f'"{target}"', f'"{inside}"')
                copied.add(inside)
        path.write_text(text, encoding="utf-8")
    return len(copied)


def broken(site: Path) -> list[str]:
    """Every link of ``site`` that leads nowhere, as a sentence; addresses of other sites are not visited."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for target in sorted(page.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            base = site if parts.path.startswith("/") else path.parent
            file = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            file = file / "index.html" if file.is_dir() else file
            where = f"{path.relative_to(site)}: {target}"
            if not file.exists() or not file.is_relative_to(site.resolve()):
                found.append(f"{where} leads to no file of the site")
            elif file in pages and unquote(parts.fragment) not in pages[file].sections and parts.fragment != "__skip":
                found.append(f"{where}: the page has no such section")
    return found


def main() -> int:
    """Build and check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zensical", default="zensical", help="the program that renders the pages")
    options = parser.parse_args()
    command = [options.zensical, "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr, sep="\n")
        return 1
    pictures = bring_pictures(SITE, ROOT)
    problems = broken(SITE)
    for problem in problems:
        print(problem, file=sys.stderr)
    pages = len(list(SITE.rglob("*.html")))
    print(f"{SITE.relative_to(ROOT)}: {pages} pages, {pictures} pictures, {len(problems)} broken links")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
