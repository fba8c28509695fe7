"""JSON lines: strict JSON, all or nothing, and readable after any crash."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from eggroll.errors import RunError, RunWriteError
from eggroll.run.metrics import JsonLines, series, to_json


@pytest.fixture
def log(tmp_path):
    return JsonLines(tmp_path / "log.jsonl")


def fill(log, count=3):
    for number in range(count):
        log.append(to_json({"generation": number, "text": "x" * number}))
    return log.path.read_bytes()


def test_lines_come_back_in_order(log):
    fill(log)
    assert [line["generation"] for line in log.read()] == [0, 1, 2]


def test_a_file_that_is_not_there_yet_is_empty(log):
    assert log.read() == []


def test_numpy_and_torch_scalars_become_numbers():
    line = to_json({"a": np.float32(0.5), "b": torch.tensor(3), "c": np.array([1, 2]), "d": Path("x"), "e": (1, True)})
    assert json.loads(line) == {"a": 0.5, "b": 3, "c": [1, 2], "d": "x", "e": [1, True]}


def test_nan_and_infinities_become_null_since_json_has_none():
    line = to_json({"a": float("nan"), "b": [np.float32("inf")], "c": {"d": -float("inf")}})
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": [None], "c": {"d": None}}


def test_text_stays_readable_and_survives(log):
    text = "größer 日本 🥚 \u2028 line\nend"
    log.append(to_json({"text": text}))
    assert "größer 日本 🥚" in log.path.read_text(encoding="utf-8")
    assert log.read() == [{"text": text}]


def test_a_lone_surrogate_survives(log):
    log.append(to_json({"text": "a\ud800b"}))
    assert log.read() == [{"text": "a\ud800b"}]


def test_what_is_not_json_is_refused_by_name():
    with pytest.raises(RunError, match=r"of type object cannot be written as JSON"):
        to_json({"a": object()})


def test_after_a_crash_at_any_byte_the_log_is_a_prefix_and_goes_on(log):
    whole = fill(log)
    lines = whole.splitlines()
    for length in range(len(whole) + 1):
        log.path.write_bytes(whole[:length])
        complete = [json.loads(line) for line in lines if len(whole[:length].split(line)) > 1]
        assert JsonLines(log.path).read() == complete
        assert log.path.read_bytes() == whole[:length], "reading must not change the file"
        again = JsonLines(log.path)
        again.append('{"generation": 99}')
        assert again.read() == [*complete, {"generation": 99}]


def test_a_tail_of_zero_bytes_as_after_a_power_cut_is_left_out(log):
    whole = fill(log)
    log.path.write_bytes(whole + b"\0" * 100)
    again = JsonLines(log.path)
    assert len(again.read()) == 3
    again.append('{"generation": 3}')
    assert len(again.read()) == 4


def test_damage_in_the_middle_is_an_error_that_names_the_line(log):
    whole = fill(log).splitlines(keepends=True)
    log.path.write_bytes(whole[0] + b"garbage\n" + whole[2])
    with pytest.raises(RunError, match=r"log\.jsonl, line 2 is not a JSON object: 'garbage'"):
        log.read()


def test_a_second_writer_is_noticed(log):
    fill(log)
    JsonLines(log.path).append('{"generation": 3}')
    with pytest.raises(RunError, match=r"was changed by another process.*Only one process may continue a run"):
        log.append('{"generation": 3}')
    assert len(log.read()) == 4


def test_keep_leaves_the_other_lines_byte_for_byte(log):
    log.path.write_bytes(b'{"generation":1,  "x": 1e-3}\n{"generation": 2}\n{"generation": 3}\n{"gener')
    assert log.keep(lambda line: line["generation"] != 2) == 1
    assert log.path.read_bytes() == b'{"generation":1,  "x": 1e-3}\n{"generation": 3}\n'
    log.append('{"generation": 4}')
    assert [line["generation"] for line in log.read()] == [1, 3, 4]


def test_a_full_disk_in_the_middle_of_a_line_leaves_the_log_as_it_was(log, monkeypatch):
    before = fill(log)
    real = os.write

    def full(descriptor, data):
        if len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RunWriteError) as caught:
        log.append('{"generation": 3, "more": 1}')
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    text = str(caught.value)
    assert text.startswith(f"{log.path} could not be written: the disk is full (No space left on device; ")
    assert text.endswith(" free). Everything written before is intact: free some space, then continue with --resume")
    log.append('{"generation": 3}')
    assert len(log.read()) == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_device_that_is_always_full(tmp_path, monkeypatch):
    monkeypatch.setattr("eggroll.run.metrics.open_plain", lambda path, flags: os.open("/dev/full", os.O_RDWR))
    with pytest.raises(RunWriteError, match="the disk is full"):
        JsonLines(tmp_path / "log.jsonl").append("{}")


def test_an_interrupt_while_writing_leaves_the_log_as_it_was(log, monkeypatch):
    before = fill(log)

    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        log.append('{"generation": 3}')
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    log.append('{"generation": 3}')
    assert len(log.read()) == 4


def test_a_directory_in_the_way_is_explained(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(RunWriteError, match=r"log\.jsonl could not be written: Is a directory"):
        JsonLines(tmp_path / "log.jsonl").append("{}")


def test_series_leaves_out_what_was_not_measured():
    lines = [{"generation": 0, "a": 1}, {"generation": 1}, {"generation": 2, "a": None}, {"generation": 3, "a": 2.5}]
    assert series(lines, "a") == ([0, 3], [1.0, 2.5])
