"""Rows out of Python objects: frames, Arrow tables and iterables that yield their rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any

from eggroll._optional import require
from eggroll.errors import DataError

ACCEPTED = (
    "a list of strings or dicts, a Hugging Face Dataset, a pandas or polars frame, an Arrow table, a file, a folder, "
    "or a hub id"
)


def rows_of_object(source: Any) -> Iterable[Any]:
    """The rows of a data set that is a Python object.

    An iterable of an unknown kind may yield rows with columns, but not strings: those may as well be the names of its
    columns.

    Raises:
        DataError: it is no data set, or what it yields are not its rows.
    """
    if _is_file(source):
        raise DataError(
            f"a data set cannot be an open file ({_name(source)}): its lines would be taken for prompts as they are. "
            "Give the path of the file"
        )
    table = _rows_of_table(source)
    if table is not None:
        return table
    if isinstance(source, bytes | bytearray | memoryview | str):
        raise DataError(f"a data set cannot be {_name(source)}; allowed are {ACCEPTED}")
    if isinstance(source, set | frozenset):
        raise DataError(
            "a data set cannot be a set: it has another order in each process, so a run could not be repeated. "
            "Give sorted(data)"
        )
    if isinstance(source, Sequence | Iterator | ValuesView | KeysView | deque) or _is_array(source):
        return source
    if isinstance(source, Iterable):
        return _with_columns(source)
    raise DataError(f"a data set cannot be a {type(source).__name__}; allowed are {ACCEPTED}")


def _rows_of_table(source: Any) -> Iterable[Any] | None:
    """The rows of a frame, a table or a column; ``None`` if it is something else."""
    library = type(source).__module__.partition(".")[0]
    if library == "datasets":
        return None  # iterates over its rows
    if library == "polars" and hasattr(source, "collect"):
        source = source.collect()
    if library == "pyarrow" and hasattr(source, "to_table"):
        source = source.to_table()
    try:
        if hasattr(source, "iloc") and hasattr(source, "columns"):
            return _pandas(source)
        for method in ("to_dicts", "to_pylist", "to_list"):  # polars, pyarrow; a column of pandas or polars
            if hasattr(source, method):
                return [_plain(row) for row in getattr(source, method)()]
        if hasattr(source, "__arrow_c_stream__") or hasattr(source, "__arrow_c_array__"):
            return list(require("pyarrow", extra="llm").table(source).to_pylist())
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"the rows of {_name(source)} cannot be read: {error}") from error
    return None


def _pandas(frame: Any) -> list[dict[str, Any]]:
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the data set has several columns of one name: {', '.join(twice)}")
    values = frame.astype(object).where(frame.notna(), None)  # missing values are None, as in Arrow
    values.columns = names
    return [{name: _plain(value) for name, value in row.items()} for row in values.to_dict("records")]


def _plain(value: Any) -> Any:
    """Lists in a frame may be arrays, for example conversations that were read from Parquet."""
    if _is_array(value) and value.ndim:
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _with_columns(source: Iterable[Any]) -> Iterator[Any]:
    for row in source:
        if isinstance(row, str):
            raise DataError(
                f"{_name(source)} yields strings (first {row[:80]!r}), which may be the names of its columns; if they "
                f"are the prompts, give list(data). Allowed are {ACCEPTED}"
            )
        yield row


def _is_file(source: Any) -> bool:
    return hasattr(source, "readline") and isinstance(source, Iterable) and not isinstance(source, Mapping)


def _is_array(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist")


def _name(source: Any) -> str:
    return f"a {type(source).__name__} of {type(source).__module__.partition('.')[0]}"
