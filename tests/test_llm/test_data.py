"""Data sets of every kind, batches that a resumed run repeats, and what wrong data is told."""

import collections
import gzip
import io
import json
import re
import tempfile
from collections import Counter

import datasets
import numpy as np
import pandas
import pyarrow
import pyarrow.dataset
import pytest

from eggroll.errors import DataError
from eggroll.llm.data.batches import batches
from eggroll.llm.data.examples import Example, columns_of, load_examples, prompts_of
from eggroll.llm.data.files import paragraphs

CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def message_of(call):
    with pytest.raises(DataError) as info:
        call()
    return str(info.value)


def test_strings_are_prompts_and_texts():
    assert load_examples(["a", "b"]) == [Example("a", "a"), Example("b", "b")]


def test_examples_pass_through():
    example = Example("a", None, {"answer": 1})
    assert load_examples([example]) == [example]


def test_other_columns_are_kept():
    (example,) = load_examples([{"prompt": "2+2?", "answer": "4", "level": 1}])
    assert example == Example("2+2?", None, {"answer": "4", "level": 1})


def test_conversation_as_prompt():
    (example,) = load_examples([{"prompt": CONVERSATION[:1]}])
    assert example.prompt == [{"role": "user", "content": "hi"}]


def test_messages_lose_the_last_assistant_turn_and_stay_a_column():
    (example,) = load_examples([{"messages": CONVERSATION}])
    assert example.prompt == CONVERSATION[:1]
    assert example.columns["messages"] == CONVERSATION


def test_messages_that_end_with_the_user_stay_whole():
    (example,) = load_examples([{"messages": CONVERSATION[:1]}])
    assert example.prompt == CONVERSATION[:1]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "answer": "a"}, "q"),
        ({"instruction": "i", "input": ""}, "i"),
        ({"instruction": "i", "input": "x"}, "i\n\nx"),
        ({"text": "t", "prompt": "p"}, "p"),
        ({"text": "t"}, "t"),
    ],
)
def test_fall_backs(row, prompt):
    assert load_examples([row])[0].prompt == prompt


def test_dataset_and_dataset_dict():
    dataset = datasets.Dataset.from_list([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}])
    expected = [Example("a", None, {"n": 1}), Example("b", None, {"n": 2})]
    assert load_examples(dataset) == expected
    assert (
        load_examples(datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}), split="test")
        == expected[1:]
    )
    message = message_of(lambda: load_examples(datasets.DatasetDict({"train": dataset}), split="dev"))
    assert message == "the data set has no split 'dev'; it has ['train']"


def test_dict_of_columns():
    assert load_examples({"prompt": ["a", "b"], "n": [1, 2]})[1] == Example("b", None, {"n": 2})
    message = message_of(lambda: load_examples({"prompt": ["a", "b"], "n": [1]}))
    assert message == "the columns of the data set have different lengths: {'prompt': 2, 'n': 1}"


ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}]
TABLE = pyarrow.Table.from_pylist(ROWS)


class PolarsFrame:
    """What counts of polars: it iterates over its columns, ``to_dicts`` gives its rows."""

    def __iter__(self):
        return iter(["prompt", "answer"])

    def to_dicts(self):
        return list(ROWS)


class ArrowStream:
    """Any library's frame: it iterates over its columns and can hand itself over to Arrow."""

    def __iter__(self):
        return iter(["prompt", "answer"])

    def __arrow_c_stream__(self, requested_schema=None):
        return TABLE.__arrow_c_stream__(requested_schema)


class Yields:
    """An iterable of an unknown kind."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize(
    "frame",
    [
        pandas.DataFrame(ROWS),
        pandas.DataFrame(ROWS, index=[7, 3]),
        TABLE,
        TABLE.to_batches()[0],
        pyarrow.dataset.dataset(TABLE),
        PolarsFrame(),
        ArrowStream(),
        {"train": pandas.DataFrame(ROWS), "test": 3},
        {"train": TABLE},
        {"train": ROWS, "test": ROWS[:1]},
        {"prompt": np.array(["a", "b"]), "answer": pandas.Series(["1", None], dtype=object)},
        {"prompt": TABLE.column(0), "answer": TABLE.column(1)},
        Yields(ROWS),
        (row for row in ROWS),
    ],
    ids=lambda frame: type(frame).__name__,
)
def test_frames_and_tables_become_rows(frame):
    """Most of them iterate over the names of their columns."""
    assert load_examples(frame) == [Example("a", None, {"answer": "1"}), Example("b", None, {"answer": None})]


def test_a_reader_of_arrow_batches():
    assert [e.prompt for e in load_examples(TABLE.to_reader())] == ["a", "b"]


def test_missing_values_and_arrays_of_a_frame():
    """A float column has NaN where a value is missing, and lists read from Parquet are arrays."""
    frame = pandas.DataFrame(
        {
            "messages": [np.array(CONVERSATION, dtype=object)] * 2,
            "level": [2.0, None],
            "options": [np.array([1, 2]), []],
        }
    )
    first, second = load_examples(frame)
    assert first.prompt == second.prompt == CONVERSATION[:1]
    assert (first.columns["level"], second.columns["level"]) == (2.0, None)
    assert (first.columns["options"], second.columns["options"]) == ([1, 2], [])


@pytest.mark.parametrize(
    "column",
    [
        pandas.Series(["a", "b"]), TABLE.column(0), TABLE.column(0).chunk(0), np.array(["a", "b"]),
        datasets.Dataset.from_list(ROWS)["prompt"], collections.deque("ab"), {1: "a", 2: "b"}.values(), iter("ab"),
    ],
    ids=lambda column: type(column).__name__,
)  # fmt: skip
def test_a_column_of_strings_is_prompts(column):
    assert [e.prompt for e in load_examples(column)] == ["a", "b"]


def test_columns_of_one_name():
    frame = pandas.DataFrame([["a", "b"]], columns=["prompt", "prompt"])
    assert message_of(lambda: load_examples(frame)) == "the data set has several columns of one name: prompt"


def test_open_files_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n')
    with path.open() as plain, gzip.open(path) as packed, tempfile.NamedTemporaryFile() as temporary:
        for stream in (plain, packed, temporary, io.StringIO("a")):
            message = message_of(lambda stream=stream: load_examples(stream))
            assert message.startswith("a data set cannot be an open file (a ")
            assert message.endswith("its lines would be taken for prompts as they are. Give the path of the file")


def test_iterables_that_do_not_yield_rows_are_refused(tmp_path):
    message = message_of(lambda: load_examples(Yields(["prompt", "answer"])))
    assert message.startswith("a Yields of ")
    assert "yields strings (first 'prompt'), which may be the names of its columns" in message
    assert "give list(data). Allowed are a list of strings or dicts, a Hugging Face Dataset, a pandas" in message
    assert "cannot be a set: it has another order in each process" in message_of(lambda: load_examples({"a", "b"}))
    assert "a data set cannot be a bytes of builtins; allowed" in message_of(lambda: load_examples(b"ab"))
    assert "row 1: a row must be" in message_of(lambda: load_examples(pandas.DataFrame(ROWS).iterrows()))
    path = str(write(tmp_path / "a.jsonl", '"a"'))
    assert f"a list with the file {path!r} in it" in message_of(lambda: load_examples([path]))


def test_lines_of_json_as_prompts_are_warned_of_once():
    with pytest.warns(UserWarning, match=re.escape("one looks like a row in JSON")) as caught:
        assert len(load_examples(['{"prompt": "a"}\n', '{"prompt": "b"}\n'])) == 2
    assert len(caught) == 1


HALVES = [
    (["ok", "a\ud83d"], "row 2: the prompt has half of a character, \\ud83d, at position 2: an emoji that was cut"),
    ([{"text": "\udcff"}], "row 1: the prompt has half of a character, \\udcff, at position 1"),
    ([Example(None, "\ud83d")], "row 1: the text has half of a character"),
    ([{"prompt": [{"role": "user", "content": "\ud83d"}]}], "row 1: the prompt has half of a character"),
    ([{"prompt": "a", "completion": [{"role": "assistant", "content": "\ud83d"}]}], "row 1: the column 'completion'"),
    ([{"prompt": "a", "tools": '[{"name": "\ud83d"}]'}], "row 1: the column 'tools'"),
]


@pytest.mark.parametrize(("rows", "message"), HALVES)
def test_half_a_character(rows, message):
    assert message in message_of(lambda: load_examples(rows))


def test_half_a_character_in_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "\\ud83d\\ude00"}\n{"prompt": "cut \\ud83d"}\n')
    assert load_examples(path, limit=1) == [Example("\U0001f600")]
    assert f"data set {path}, row 2: the prompt has half of a character" in message_of(lambda: load_examples(path))


def test_what_python_cannot_read_of_json_and_csv(tmp_path):
    number, nested = '{"prompt": "a", "n": ' + "1" * 5000 + "}", '{"prompt": ' + "[" * 10**5 + "]" * 10**5 + "}"
    for name, where in (("a.jsonl", ", line 1"), ("a.json", "")):
        path = write(tmp_path / name, number if name == "a.jsonl" else f"[{number}]")
        assert message_of(lambda path=path: load_examples(path)) == (
            f"data set {path}{where}: a number has more than 4300 digits, which Python does not read. "
            "Write it as a string"
        )
        path = write(tmp_path / name, nested if name == "a.jsonl" else f"[{nested}]")
        assert message_of(lambda path=path: load_examples(path)) == (
            f"data set {path}{where}: lists or objects are nested too deeply to be read; a row needs few levels"
        )
    path = write(tmp_path / "a.csv", "prompt\nfine\n" + "x" * 131_073 + "\n")
    assert [e.prompt for e in load_examples(path, limit=1)] == ["fine"]
    assert message_of(lambda: load_examples(path)) == (
        f"data set {path}, line 3: cannot be read as CSV (field larger than field limit (131072)): a field may have "
        "131,072 characters (is a quote not closed?); a .jsonl file holds longer texts"
    )


def test_values_that_cannot_be_shown():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert message_of(lambda: load_examples([{"prompt": deep}])).endswith("got a list")
    assert message_of(lambda: load_examples([{"prompt": 10**5000}])).endswith("got a int")


def test_a_damaged_archive(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    packed = bytearray(gzip.compress(b'{"prompt": "a"}\n' * 1000))
    packed[12:30] = b"\xff" * 18
    path.write_bytes(packed)
    assert f"data set {path} cannot be read: " in message_of(lambda: load_examples(path))


def test_jsonl_plain_and_compressed(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "ü", "n": 2}]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    write(tmp_path / "plain.jsonl", text)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write(text)
    write(tmp_path / "list.json", json.dumps(rows))
    expected = [Example("a", None, {"n": 1}), Example("ü", None, {"n": 2})]
    for name in ("plain.jsonl", "packed.jsonl.gz", "list.json"):
        assert load_examples(tmp_path / name) == expected
        assert load_examples(str(tmp_path / name), limit=1) == expected[:1]


def test_limit_stops_reading_before_a_later_error(tmp_path):
    path = write(tmp_path / "a.jsonl", '"one"\n{broken\n')
    assert load_examples(path, limit=1) == [Example("one", "one")]


def test_csv_and_parquet(tmp_path):
    write(tmp_path / "a.csv", 'prompt,answer\n"2, 3?",5\n')
    datasets.Dataset.from_list([{"prompt": "2, 3?", "answer": "5"}]).to_parquet(tmp_path / "a.parquet")
    expected = [Example("2, 3?", None, {"answer": "5"})]
    assert load_examples(tmp_path / "a.csv") == expected
    assert load_examples(tmp_path / "a.parquet") == expected


def test_text_file_is_lines_for_prompts_and_paragraphs_for_text(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo\n\n  three\n")
    assert [e.prompt for e in load_examples(path)] == ["one", "two", "three"]
    assert [e.text for e in load_examples(path, purpose="text")] == ["one\ntwo", "three"]


def test_long_paragraphs_are_cut_at_white_space_and_lose_nothing():
    text = " ".join(f"word{number}" for number in range(1000))
    pieces = list(paragraphs(text))
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= 2000
    assert " ".join(pieces) == text
    assert "".join(paragraphs("x" * 4500)) == "x" * 4500


def test_folder(tmp_path):
    write(tmp_path / "b.txt", "two")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "readme.md", "no data")
    assert [e.prompt for e in load_examples(tmp_path)] == ["one", "two"]


def test_folder_with_splits(tmp_path):
    write(tmp_path / "train.jsonl", '"a"')
    write(tmp_path / "test.jsonl", '"b"')
    assert load_examples(tmp_path) == [Example("a", "a")]
    assert load_examples(tmp_path, split="test") == [Example("b", "b")]


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"prompt": "b"}])}).save_to_disk(tmp_path / "dict")
    assert load_examples(tmp_path / "saved") == [Example("a")]
    assert load_examples(tmp_path / "dict", split="test") == [Example("b")]


def test_gsm8k(data_dir):
    examples = load_examples(data_dir / "gsm8k", split="test")
    assert len(examples) == 1319
    assert examples[0].prompt.startswith("Janet")
    assert examples[0].columns["answer"].endswith("#### 18")


def test_empty_rows_are_skipped_and_an_empty_set_is_an_error(tmp_path):
    assert load_examples([{"text": ""}, {"text": "a"}]) == [Example("a", "a")]
    path = write(tmp_path / "a.jsonl", "\n")
    assert message_of(lambda: load_examples(path)) == (
        f"data set {path} is empty: it has no row with any text. A data set needs at least one example"
    )
    assert "is empty" in message_of(lambda: load_examples([]))


def test_missing_column(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"promt": "b", "n": 1}\n')
    assert message_of(lambda: load_examples(path)) == (
        f"data set {path}, row 2 has the columns ['n', 'promt']; "
        "it needs one of prompt, messages, question, instruction, text, problem"
    )


def test_prompt_of_a_wrong_form():
    message = message_of(lambda: load_examples([{"prompt": 3}]))
    assert (
        "row 1: the column 'prompt' must be a string or a list of messages with 'role' and 'content', got 3" in message
    )
    assert 'got [{"from"' in message_of(lambda: load_examples([{"messages": [{"from": "user"}]}]))


def test_missing_file_lists_near_matches(tmp_path):
    write(tmp_path / "prompts.jsonl", '"a"')
    message = message_of(lambda: load_examples(str(tmp_path / "promts.jsonl")))
    assert message == f"data set {tmp_path / 'promts.jsonl'} does not exist. In {tmp_path} there is: prompts.jsonl"
    message = message_of(lambda: load_examples("./no_such_folder_here/a.txt"))
    assert message == "data set no_such_folder_here/a.txt does not exist, nor does the folder no_such_folder_here"


def test_bad_json_line_has_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n\n{"prompt": b}\n')
    assert message_of(lambda: load_examples(path)) == (
        f"data set {path}, line 3: not valid JSON (Expecting value at column 12): '{{\"prompt\": b}}'. "
        "A .jsonl file holds one JSON object per line"
    )
    path = write(tmp_path / "b.jsonl", "3\n")
    assert message_of(lambda: load_examples(path)) == f"data set {path}, line 1: must be an object or a string, got int"


def test_other_broken_files(tmp_path):
    path = write(tmp_path / "lines.json", '{"prompt": "a"}\n{"prompt": "b"}\n')
    assert "(one object per line? then name it .jsonl)" in message_of(lambda: load_examples(path))
    path = write(tmp_path / "object.json", '{"prompt": "a"}')
    assert message_of(lambda: load_examples(path)).endswith("must hold a JSON list of strings or objects, not dict")
    path = write(tmp_path / "a.csv", "prompt\na,b\n")
    assert "line 2: more fields than the header has (['prompt'])" in message_of(lambda: load_examples(path))
    path = tmp_path / "latin.txt"
    path.write_bytes("ü".encode("latin-1"))
    assert "is not UTF-8 text" in message_of(lambda: load_examples(path))
    path = write(tmp_path / "a.xlsx", "x")
    assert message_of(lambda: load_examples(path)) == (
        f"data set {path} ends with '.xlsx'; known are .jsonl, .json, .txt, .csv, .parquet (also .gz)"
    )
    path = write(tmp_path / "a.parquet", "x")
    assert "cannot be read as Parquet" in message_of(lambda: load_examples(path))
    path = write(tmp_path / "a.jsonl.gz", "x")
    assert "cannot be read: Not a gzipped file" in message_of(lambda: load_examples(path))


def test_hub_data_set_that_is_not_there():
    message = message_of(lambda: load_examples("no-such-owner/no-such-set:part"))
    assert message.startswith("data set 'no-such-owner/no-such-set:part' is neither a file or folder here nor could it")
    assert "configuration 'part'" in message
    assert "give a .jsonl or .txt file" in message


def test_things_that_are_no_data_set():
    assert "a data set cannot be a int" in message_of(lambda: load_examples(3))
    assert "limit (=0) must be at least 1" in message_of(lambda: load_examples(["a"], limit=0))
    assert "row 1: a row must be a string or an object with columns, not int" in message_of(lambda: load_examples([1]))


def test_prompts_of_names_the_example_without_a_prompt():
    message = message_of(lambda: prompts_of([Example("a"), Example(None, "t", {"n": 1})]))
    assert message.startswith("example 2 has no prompt: its columns are ['n'].")


def test_columns_of():
    assert columns_of([Example("a", None, {"n": 1}), Example("b", None, {"m": 2})]) == {"n": [1, None], "m": [None, 2]}


@pytest.mark.parametrize(("count", "size"), [(12, 4), (10, 4), (5, 2), (7, 7), (3, 1)])
def test_a_pass_sees_every_example(count, size):
    examples = [Example(str(number)) for number in range(count)]
    steps = -(-count // size)
    for epoch in range(3):
        seen = [batches(examples, size, epoch * steps + step, seed=1) for step in range(steps)]
        assert all(len(batch) == len({e.prompt for e in batch}) == size for batch in seen)
        counts = Counter(e.prompt for batch in seen for e in batch)
        assert len(counts) == count
        assert max(counts.values()) <= 2


def test_batches_are_a_function_of_seed_and_generation():
    examples = [Example(str(number)) for number in range(50)]
    order = [batches(examples, 8, generation, seed=3) for generation in range(20)]
    assert [batches(examples, 8, generation, seed=3) for generation in reversed(range(20))] == order[::-1]
    assert batches(examples, 8, 0, seed=4) != order[0]
    assert order[0] != order[7]  # 7 batches are a pass, and the next is shuffled anew
    # fixed for ever: runs are resumed and replayed by other versions
    assert [int(e.prompt) for e in order[0]] == [49, 8, 7, 36, 42, 19, 17, 25]


def test_batch_larger_than_the_set_is_the_set():
    examples = [Example("a"), Example("b")]
    assert sorted(e.prompt for e in batches(examples, 10, 5, seed=0)) == ["a", "b"]


def test_impossible_batches():
    assert "no examples" in message_of(lambda: batches([], 1, 0, 0))
    assert "(=0) must be at least 1" in message_of(lambda: batches([Example("a")], 0, 0, 0))
