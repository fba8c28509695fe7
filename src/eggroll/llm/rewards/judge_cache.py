"""Grades that were given before, on disk: a generation that is done again gets the same scores, and pays nothing."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from eggroll._environment import CACHE, cache_directory
from eggroll.errors import RewardError

FILE = "judge/grades.sqlite"
_TABLE = "CREATE TABLE IF NOT EXISTS grades (key TEXT PRIMARY KEY, score REAL NOT NULL, reply TEXT NOT NULL)"
_AT_ONCE = 500  # keys of one look-up; SQLite takes at least 999 parameters
Grade = tuple[float, str]
"""A score in the judge's own range, and the words that it came with."""


def key_of(**parts: object) -> str:
    """The key of a grade: a digest of everything that it depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class GradeCache:
    """Grades by key, in one SQLite file that several processes may use at once.

    Args:
        path: the file; ``None`` is ``judge/grades.sqlite`` in the cache directory.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = cache_directory() / FILE if path is None else Path(path).expanduser()

    def find(self, keys: Iterable[str]) -> dict[str, Grade]:
        """The grades that are known.

        Raises:
            RewardError: the file cannot be used.
        """
        wanted, found = list(keys), dict[str, Grade]()
        if not wanted or not self.path.exists():
            return found
        try:
            with closing(self._open()) as database:
                for start in range(0, len(wanted), _AT_ONCE):
                    some = wanted[start : start + _AT_ONCE]
                    marks = ",".join("?" * len(some))
                    rows = database.execute(f"SELECT key, score, reply FROM grades WHERE key IN ({marks})", some)
                    found.update({key: (score, reply) for key, score, reply in rows})
        except sqlite3.Error as error:
            raise self._unusable(error) from error
        return found

    def add(self, key: str, grade: Grade) -> None:
        """Keep a grade; one that is there already stays.

        Raises:
            RewardError: the file cannot be used.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute("INSERT OR IGNORE INTO grades VALUES (?, ?, ?)", (key, *grade))
        except (sqlite3.Error, OSError) as error:
            raise self._unusable(error) from error

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=30)
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(_TABLE)
        return database

    def _unusable(self, error: Exception) -> RewardError:
        return RewardError(
            f"the judge's cache {self.path} cannot be used: {error}. Move the file away, or set {CACHE} to a folder "
            "that can be written to"
        )
