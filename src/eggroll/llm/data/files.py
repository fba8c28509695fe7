"""Rows out of data files: JSON lines, JSON, text, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from eggroll._optional import require
from eggroll.errors import DataError

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".parquet")
"""Known endings; all but Parquet may be followed by ``.gz``."""

LONGEST_TEXT = 2000
"""Characters of one text example (about 500 tokens); longer paragraphs are cut at white space."""


def read_rows(path: Path, purpose: str) -> Iterator[Any]:
    """The rows of one file: dicts, or strings for ``.txt``.

    Args:
        path: a file with one of the known endings.
        purpose: ``prompts`` cuts a ``.txt`` file into lines, ``text`` into paragraphs.

    Raises:
        DataError: the ending is unknown, or the content is not what the ending says (with the line number).
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path)
        return
    if suffix not in SUFFIXES:
        raise DataError(
            f"data set {path} ends with {suffix or 'nothing'!r}; known are {', '.join(SUFFIXES)} (also .gz)"
        )
    try:
        with _open(path) as stream:
            if suffix == ".jsonl":
                yield from _json_lines(path, stream)
            elif suffix == ".json":
                yield from _json(path, stream)
            elif suffix == ".csv":
                yield from _csv(path, stream)
            elif purpose == "text":
                yield from paragraphs(stream.read())
            else:
                yield from (line.strip() for line in stream)
    except UnicodeDecodeError as error:
        raise DataError(f"data set {path} is not UTF-8 text: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data set {path} cannot be read: {error}") from error


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a document, cut where they are longer than ``LONGEST_TEXT`` characters."""
    for paragraph in re.split(r"\n\s*\n", text):
        rest = paragraph.strip()
        while len(rest) > LONGEST_TEXT:
            cut = max(rest.rfind(" ", 1, LONGEST_TEXT), rest.rfind("\n", 1, LONGEST_TEXT))
            cut = cut if cut > 0 else LONGEST_TEXT
            yield rest[:cut].rstrip()
            rest = rest[cut:].lstrip()
        if rest:
            yield rest


def _open(path: Path) -> TextIO:
    # utf-8-sig: files written on Windows may start with a byte order mark
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline=None)
    return path.open(encoding="utf-8-sig")


def _json_lines(path: Path, stream: TextIO) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line, f"data set {path}, line {number}")
        except json.JSONDecodeError as error:
            raise DataError(
                f"data set {path}, line {number}: not valid JSON ({error.msg} at column {error.colno}): {_shown(line)}"
                ". A .jsonl file holds one JSON object per line"
            ) from error
        yield _checked(row, f"data set {path}, line {number}")


def _parsed(text: str, where: str) -> Any:
    """JSON as Python objects; what Python cannot hold is refused, what is no JSON raises ``JSONDecodeError``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        digits = sys.get_int_max_str_digits()
        raise DataError(
            f"{where}: a number has more than {digits} digits, which Python does not read. Write it as a string"
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{where}: lists or objects are nested too deeply to be read; a row needs few levels"
        ) from error


def _json(path: Path, stream: TextIO) -> Iterator[Any]:
    text = stream.read()
    try:
        content = _parsed(text, f"data set {path}")
    except json.JSONDecodeError as error:
        hint = " (one object per line? then name it .jsonl)" if error.msg == "Extra data" else ""
        raise DataError(
            f"data set {path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}){hint}"
        ) from error
    if not isinstance(content, list):
        raise DataError(f"data set {path} must hold a JSON list of strings or objects, not {type(content).__name__}")
    for number, row in enumerate(content, start=1):
        yield _checked(row, f"data set {path}, row {number}")


def _csv(path: Path, stream: TextIO) -> Iterator[Any]:
    reader = csv.DictReader(stream)
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    f"data set {path}, line {reader.line_num}: more fields than the header has ({reader.fieldnames}); "
                    'put a field that holds a comma into "quotes"'
                )
            yield row
    except csv.Error as error:
        hint = (
            f"a field may have {csv.field_size_limit():,} characters (is a quote not closed?); a .jsonl file holds "
            "longer texts"
            if "field larger" in str(error)
            else "it must be comma-separated text with a header"
        )
        raise DataError(
            f"data set {path}, line {reader.line_num + 1}: cannot be read as CSV ({error}): {hint}"
        ) from error


def _parquet(path: Path) -> Iterator[Any]:
    datasets = require("datasets", extra="llm")
    try:
        yield from datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:
        raise DataError(f"data set {path} cannot be read as Parquet: {error}") from error


def _checked(row: Any, where: str) -> Any:
    if not isinstance(row, str | dict):
        raise DataError(f"{where}: must be an object or a string, got {type(row).__name__}")
    return row


def _shown(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= 80 else line[:77] + "...")
