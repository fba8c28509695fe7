"""Update records: exact through JSON, safe against a torn line, strict about gaps."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eggroll.core.records import UpdateRecord, read_records
from eggroll.errors import RunError


def record(generation):
    return UpdateRecord.make(generation, 0.01, 0.5, np.array([0.1, -0.3], np.float32))


def write(path, generations, tail=""):
    path.write_text("".join(record(generation).to_json() + "\n" for generation in generations) + tail)
    return path


@given(
    st.integers(0, 2**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
    arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)),
)
def test_json_keeps_every_bit(generation, sigma, lr, weights):
    made = UpdateRecord.make(generation, sigma, lr, weights)
    read = UpdateRecord.from_json(made.to_json())
    assert read == made
    assert read.weights.dtype == np.float32
    np.testing.assert_array_equal(read.weights.view(np.uint32), weights.view(np.uint32))


def test_a_record_is_one_line():
    assert "\n" not in record(3).to_json()


def test_a_log_is_read_in_order(tmp_path):
    assert list(read_records(write(tmp_path / "updates.jsonl", range(4)))) == [record(i) for i in range(4)]


def test_an_empty_log(tmp_path):
    assert list(read_records(write(tmp_path / "updates.jsonl", []))) == []


@pytest.mark.parametrize("cut", [1, 12, 40, -1])
def test_a_torn_last_line_is_left_out(tmp_path, cut):
    path = write(tmp_path / "updates.jsonl", range(3), tail=record(3).to_json()[:cut])
    assert list(read_records(path)) == [record(i) for i in range(3)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = write(tmp_path / "updates.jsonl", [0], tail='{"generation": 1, "sig\n' + record(2).to_json() + "\n")
    with pytest.raises(RunError, match=r"updates\.jsonl, line 2 is not an update record .*; the log cannot be used"):
        list(read_records(path))


@pytest.mark.parametrize("line", ["[]", "3", '{"generation": 1}', "null"])
def test_json_that_is_no_record_is_an_error(tmp_path, line):
    path = write(tmp_path / "updates.jsonl", [0], tail=f"{line}\n{record(2).to_json()}\n")
    with pytest.raises(RunError, match="line 2 is not an update record"):
        list(read_records(path))


@pytest.mark.parametrize(("generations", "line", "found"), [([0, 2], 2, 2), ([1], 1, 1), ([0, 1, 1], 3, 1)])
def test_a_gap_or_a_repeat_is_an_error(tmp_path, generations, line, found):
    path = write(tmp_path / "updates.jsonl", generations)
    with pytest.raises(RunError, match=f"line {line} is of generation {found}, expected {line - 1}; a part is missing"):
        list(read_records(path))


def test_many_sixteenths_are_packed_and_come_back_exactly():
    rng = np.random.default_rng(0)
    sixteenths = rng.integers(-127, 128, 4096) / 16
    made = UpdateRecord.make(7, 0.25, 0.5, sixteenths)
    line = made.to_json()
    assert len(line) < 1.5 * len(sixteenths)
    assert UpdateRecord.from_json(line) == made
    few, fractions = UpdateRecord.make(0, 1.0, 1.0, sixteenths[:255]), UpdateRecord.make(0, 1.0, 1.0, sixteenths / 3)
    large = UpdateRecord.make(0, 1.0, 1.0, 16 * sixteenths)
    for record in (few, fractions, large):
        assert "shaped_fitness" in json.loads(record.to_json())
        assert UpdateRecord.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match=r"Incorrect padding|Only base64"):
        UpdateRecord.from_json(line.replace(line[-12:-2], "?"))
