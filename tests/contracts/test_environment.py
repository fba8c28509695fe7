"""Environment variables: read in one place, and each of them documented."""

import re
from pathlib import Path

from eggroll import _environment

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("src", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_all_are_documented():
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    named = {name for path in FILES for name in re.findall(r"EGGROLL_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert named == set(re.findall(r"EGGROLL_[A-Z_]+", text))


def test_they_are_read_in_one_place():
    pattern = re.compile(r"environ(\.get\(|\[).*EGGROLL_")
    readers = [path.name for path in FILES if pattern.search(path.read_text(encoding="utf-8"))]
    assert readers == []


def test_the_cache(monkeypatch, tmp_path):
    for name in ("EGGROLL_CACHE_DIR", "EGGROLL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _environment.cache_directory() == tmp_path / "eggroll"
    monkeypatch.setenv("EGGROLL_CACHE", str(tmp_path / "old"))
    assert _environment.cache_directory() == tmp_path / "old"
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path / "new"))
    assert _environment.cache_directory() == tmp_path / "new"
