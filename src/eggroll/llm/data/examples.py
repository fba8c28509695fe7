"""Data sets: prompts, texts and the columns that go with them, from files, folders, objects or the hub.

The conventions are TRL's: a column ``prompt`` (a string, or a conversation: a list of ``{"role", "content"}``), or
``messages`` (its last assistant turn is the reference and is dropped from the prompt); every other column is kept and
handed to rewards that ask for it. ``text`` holds documents for the perplexity reward.
"""

from __future__ import annotations

import difflib
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eggroll._optional import require
from eggroll.errors import DataError
from eggroll.llm.data.characters import check_characters
from eggroll.llm.data.files import SUFFIXES, read_rows
from eggroll.llm.data.tables import rows_of_object
from eggroll.llm.models.hub import offline_hint, offline_if_unreachable

Message = dict[str, Any]
Purpose = Literal["prompts", "text", "worlds"]

PROMPT_COLUMNS = ("prompt", "messages", "question", "instruction", "text", "problem")
"""Where a prompt is looked for, in this order."""

READ_COLUMNS = ("completion", "messages", "tools", "chat_template_kwargs")
"""Further columns that the tokenizer or its chat template reads."""


@dataclass(frozen=True)
class Example:
    """One row of a data set.

    Attributes:
        prompt: what the model is asked: a string, or a conversation (a list of messages).
        text: a document, for rewards that read the likelihood of a given text.
        columns: every other column, as the data set has it.
    """

    prompt: str | list[Message] | None
    text: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


def load_examples(
    source: Any,
    *,
    split: str = "train",
    limit: int | None = None,
    purpose: Purpose = "prompts",
    check: Callable[[dict[str, Any]], None] | None = None,
) -> list[Example]:
    """Read a data set, whatever it is.

    Args:
        source: a list of strings, dicts or Examples; a Hugging Face ``Dataset`` or ``DatasetDict``; a pandas or polars
            frame or an Arrow table; a dict of columns; a file (``.jsonl``, ``.json``, ``.txt``, ``.csv``,
            ``.parquet``; also with ``.gz``); a folder of such files or one that ``Dataset.save_to_disk`` wrote; or a
            hub id, ``"name"`` or ``"name:config"``.
        split: which part of a hub data set or ``DatasetDict`` is read; in a folder the files whose names start with
            it, if there are any.
        limit: read at most so many examples.
        purpose: how a ``.txt`` file is cut: ``prompts`` takes one per line, ``text`` takes paragraphs (separated by
            empty lines). For ``worlds`` a row needs no prompt, since a world may begin by itself.
        check: raises ``DataError`` about the columns of a row that the reward cannot use; the message then says which
            row of what it is.

    Raises:
        DataError: nothing is there, the set is empty, or a row is not of a known form.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit (={limit}) must be at least 1, or None for all examples")
    label, rows = _rows(source, split, purpose)
    if purpose == "worlds":
        rows = map(_with_prompt, rows)
    examples = (_example(row, f"{label}, row {number}", check) for number, row in enumerate(rows, start=1))
    found = list(itertools.islice((example for example in examples if not _is_blank(example)), limit))
    if not found:
        raise DataError(f"{label} is empty: it has no row with any text. A data set needs at least one example")
    return found


def check_source(source: str) -> None:
    """Refuse the path of a file or folder that is not there; nothing is read.

    Raises:
        DataError: as :func:`load_examples`.
    """
    if _looks_like_path(source) and not Path(source).expanduser().exists():
        raise DataError(_missing_file(Path(source).expanduser()))


def prompts_of(examples: Sequence[Example]) -> list[str | list[Message]]:
    """The prompts of all examples.

    Raises:
        DataError: an example has none; the message says which columns it has.
    """
    prompts = []
    for number, example in enumerate(examples, start=1):
        if example.prompt is None:
            raise DataError(
                f"example {number} has no prompt: its columns are {sorted(example.columns)}. A prompt is a string or a "
                f"list of messages in one of the columns {', '.join(PROMPT_COLUMNS)}"
            )
        prompts.append(example.prompt)
    return prompts


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The extra columns, column by column, one value per example (``None`` where an example lacks it)."""
    names = list(dict.fromkeys(name for example in examples for name in example.columns))
    return {name: [example.columns.get(name) for example in examples] for name in names}


def _rows(source: Any, split: str, purpose: Purpose) -> tuple[str, Iterable[Any]]:
    """A label for messages, and the rows as strings, dicts or Examples."""
    if isinstance(source, Path):
        return f"data set {source}", _rows_of_path(source, split, purpose)
    if isinstance(source, str):
        path = Path(source).expanduser()
        if path.exists():
            return f"data set {source}", _rows_of_path(path, split, purpose)
        if _looks_like_path(source):
            raise DataError(_missing_file(path))
        return f"data set {source!r} (split {split!r})", _rows_of_hub(source, split)
    if isinstance(source, Mapping):
        return "the data set", _rows_of_mapping(source, split)
    return "the data set", _no_stand_ins(rows_of_object(source))


def _no_stand_ins(rows: Iterable[Any]) -> Iterator[Any]:
    """Looks for strings that stand for rows: refuses the names of data files, warns of lines of JSON (once)."""
    warned = False
    for row in rows:
        if isinstance(row, str):
            if len(row) < 1000 and row.removesuffix(".gz").endswith(SUFFIXES) and Path(row).is_file():
                raise DataError(
                    f"the data set is a list with the file {row!r} in it, whose name would be taken for a prompt. Give "
                    "one path, or the folder; or read each file with load_examples() and add up the lists"
                )
            if not warned and _is_json_row(row):
                warned = True
                warnings.warn(
                    f"strings of a data set are prompts as they are, and one looks like a row in JSON: "
                    f"{_shorten(row)}. If it is one, give json.loads(line), or the path of the file",
                    stacklevel=2,
                )
        yield row


def _is_json_row(text: str) -> bool:
    if not (text.startswith("{") and text.rstrip().endswith("}")):
        return False
    try:
        return not set(PROMPT_COLUMNS).isdisjoint(json.loads(text))
    except (ValueError, RecursionError):
        return False


def _rows_of_mapping(source: Mapping[str, Any], split: str) -> Iterable[Any]:
    """A ``DatasetDict`` (split name to Dataset, frame or list), or a dict of columns."""
    if split in source and set(PROMPT_COLUMNS).isdisjoint(source):
        found = source[split]
        return _rows_of_mapping(found, split) if isinstance(found, Mapping) else rows_of_object(found)
    source = {name: _column(values) for name, values in source.items()}
    values = list(source.values())
    if values and all(isinstance(value, list | tuple) for value in values):
        lengths = {name: len(column) for name, column in source.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"the columns of the data set have different lengths: {lengths}")
        return [dict(zip(source, row, strict=True)) for row in zip(*values, strict=True)]
    raise DataError(f"the data set has no split {split!r}; it has {sorted(map(str, source))}")


def _column(values: Any) -> Any:
    """A column as a list, if it is an array or a column of a frame."""
    for method in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, method) and not isinstance(values, Mapping) and not hasattr(values, "column_names"):
            return getattr(values, method)()
    return values


def _rows_of_path(path: Path, split: str, purpose: Purpose) -> Iterator[Any]:
    if not path.exists():
        raise DataError(_missing_file(path))
    if path.is_file():
        yield from read_rows(path, purpose)
        return
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        stored = require("datasets", extra="llm").load_from_disk(str(path))
        yield from _rows_of_mapping(stored, split) if isinstance(stored, Mapping) else stored
        return
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.name.removesuffix(".gz").endswith(SUFFIXES)
    )
    if not files:
        raise DataError(f"folder {path} has no file that ends with {', '.join(SUFFIXES)} (also with .gz)")
    of_split = [file for file in files if file.name.startswith(split)]
    for file in of_split or files:
        yield from read_rows(file, purpose)


def _rows_of_hub(source: str, split: str) -> Iterator[Any]:
    name, _, config = source.partition(":")
    datasets = require("datasets", extra="llm")
    try:
        with offline_if_unreachable():
            found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        raise DataError(
            f"data set {source!r} is neither a file or folder here nor could it be loaded from the Hugging Face hub "
            f"(split {split!r}, configuration {config or 'the default'!r}): {_first_line(error)}. A configuration is "
            f"written name:config; without a network{offline_hint()}, give a .jsonl or .txt file"
        ) from error
    yield from found


def _with_prompt(row: Any) -> Any:
    """A row for a world; one without a prompt begins with an empty message of the user's, as with TRL."""
    if not isinstance(row, Mapping) or any(row.get(name) is not None for name in PROMPT_COLUMNS):
        return row
    return {**row, "prompt": [{"role": "user", "content": ""}]}


def _example(row: Any, where: str, check: Callable[[dict[str, Any]], None] | None) -> Example:
    example = _example_of(row, where)
    for name in ("prompt", "text"):
        check_characters(getattr(example, name), f"{where}: the {name}")
    for name in READ_COLUMNS:
        check_characters(example.columns.get(name), f"{where}: the column {name!r}")
    try:
        if check is not None:
            check(example.columns)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return example


def _example_of(row: Any, where: str) -> Example:
    if isinstance(row, Example):
        return row
    if isinstance(row, str):
        return Example(prompt=row, text=row)
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: a row must be a string or an object with columns, not {type(row).__name__}")
    row = {str(name): value for name, value in row.items()}
    text = row.get("text")
    if not any(row.get(name) is not None for name in (*PROMPT_COLUMNS, "completion")):
        raise DataError(f"{where} has the columns {sorted(row)}; it needs one of {', '.join(PROMPT_COLUMNS)}")
    return Example(
        prompt=_prompt(row, where),
        text=text if isinstance(text, str) else None,
        columns={name: value for name, value in row.items() if name not in ("prompt", "text")},
    )


def _prompt(row: dict[str, Any], where: str) -> str | list[Message] | None:
    name = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
    if name is None:
        return None
    value = row[name]
    if isinstance(value, str):
        extra = row.get("input") if name == "instruction" else None
        return f"{value}\n\n{extra}" if extra else value
    if isinstance(value, Sequence) and value and all(_is_message(message) for message in value):
        turns = [dict(message) for message in value]
        if name == "messages" and len(turns) > 1 and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return turns
    raise DataError(
        f"{where}: the column {name!r} must be a string or a list of messages with 'role' and 'content', "
        f"got {_shorten(value)}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _is_blank(example: Example) -> bool:
    """Rows without text, such as the empty lines of wikitext, are no examples."""
    if isinstance(example.prompt, list):
        return False
    has_completion = bool(example.columns.get("completion"))
    return not (example.prompt or "").strip() and not (example.text or "").strip() and not has_completion


def _looks_like_path(source: str) -> bool:
    return source.removesuffix(".gz").endswith(SUFFIXES) or source.startswith((".", "/", "~"))


def _missing_file(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"data set {path} does not exist, nor does the folder {parent}"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    usable = [name for name in names if name.removesuffix(".gz").endswith(SUFFIXES)]
    shown = list(dict.fromkeys([*near, *usable]))[:6]
    return f"data set {path} does not exist. " + (
        f"In {parent} there is: {', '.join(shown)}"
        if shown
        else f"{parent} has no file that ends with {', '.join(SUFFIXES)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _shorten(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        try:
            text = repr(value)
        except (ValueError, RecursionError):
            text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
