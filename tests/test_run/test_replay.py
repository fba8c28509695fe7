"""Replay: the records of exactly the generations asked for, in order, or nothing at all."""

from __future__ import annotations

import json

import pytest

from eggroll.errors import RunError
from eggroll.run.replay import replay, replay_run


@pytest.fixture
def applied():
    return []


def test_all_records_in_order(five, record, applied):
    assert replay_run(five, applied.append) == 5
    assert applied == [record(generation) for generation in range(5)]


def test_a_part_from_a_checkpoint_to_a_generation(five, record, applied):
    assert replay_run(five, applied.append, start=2, to=4) == 4
    assert applied == [record(2), record(3)]


def test_generation_0_is_the_base_model(five, applied):
    assert replay_run(five, applied.append, to=0) == 0
    assert applied == []


def test_a_run_without_updates(run, applied):
    assert replay_run(run, applied.append) == 0


@pytest.mark.parametrize("to", [6, -1])
def test_a_generation_beyond_the_log(five, applied, to):
    message = rf"generation {to} cannot be rebuilt: the log holds 5 finished generations; choose 0 to 5"
    with pytest.raises(RunError, match=message):
        replay_run(five, applied.append, to=to)
    assert applied == []


def test_weights_that_are_already_later(five, applied):
    with pytest.raises(RunError, match="weights after 4 updates cannot be taken to generation 2"):
        replay_run(five, applied.append, start=4, to=2)


def test_a_missing_record_is_found_before_anything_is_applied(record, applied):
    with pytest.raises(RunError, match="the log holds generation 2 where 1 was expected; a part is missing"):
        replay([record(0), record(2)], applied.append)
    assert applied == []


def test_a_log_with_a_hole(five, applied):
    path = five.path / "updates.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2] + lines[3:]))
    with pytest.raises(RunError, match=r"updates.jsonl, line 3 is of generation 3, expected 2; a part is missing"):
        replay_run(five, applied.append)


def test_another_version_of_the_noise(five, applied):
    path = five.path / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "noise_version": 7}))
    again = type(five).open(five.path)
    with pytest.raises(RunError, match=r"made with version 7 of the noise .* draws version 1; replay it with .*0\.1"):
        replay_run(again, applied.append)
