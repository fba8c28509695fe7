"""Whatever is in a run's directory: resuming it, replaying it and reporting it end, and in a sentence if at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
from test_run.pages import plots_of
from test_run.toys import KIND, quick, resume, train

from eggroll import lifecycle
from eggroll.core.reading import MAX_DEPTH, parse
from eggroll.errors import EggrollError
from eggroll.run import RunDir
from eggroll.run.report import write_comparison, write_report
from eggroll.run.report.view import RunView

DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" + "0" * 400
VALUES = ("null", '"text"', "-1", "NaN", HUGE, DEEP)
PLACES = {
    "config.json": ["kind", "options", "options.lr", "options.population_size", "options.betas", "options.resume"],
    "environment.json": ["run_id", "command", "packages", "resumed", "gpus", "noise_version", "started_utc"],
    "updates.jsonl": ["generation", "sigma", "lr", "shaped_fitness", "check"],
    "metrics.jsonl": ["generation", "fitness_mean", "evaluate_s", "elapsed_s", "heldout_reward", "steps"],
    "samples.jsonl": ["generation", "prompt", "completion", "reward", "member"],
    "checkpoints/generation-000003/manifest.json": [
        *("format", "generation", "noise_version", "run_id", "tensors", "state", "log", "tensors.file", "state.config"),
        *("tensors.bytes", "tensors.sha256", "tensors.framework"),
    ],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(folder), quick():
        train(output="base")
    for path in (folder / "base").rglob("*.json*"):  # as of an older version, as the checksums would catch everything
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        values = [{k: v for k, v in json.loads(line).items() if k not in ("check", "log")} for line in lines]
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder / "base"


@pytest.fixture
def restored(finished, tmp_path, monkeypatch):
    """``restored()`` makes the folder ``base`` as it was, and returns it."""
    monkeypatch.chdir(tmp_path)

    def restore():
        shutil.rmtree("base", ignore_errors=True)
        return Path(shutil.copytree(finished, "base"))

    with quick(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield restore


def texts_of(base):
    """What reporting, comparing, replaying and resuming say, each empty if it can be done; other errors are raised."""
    calls = (
        lambda: write_report(RunDir.open(base), defaults={"lr": 0.1, "betas": (0.9, 0.999)}),
        lambda: write_comparison([RunView(RunDir.open(base), name) for name in ("one", "two")], "both.html"),
        lambda: lifecycle.replay(KIND, RunDir.open(base), allow_difference=True),
        lambda: resume(base, generations=4),
    )
    said = []
    for call in calls:
        try:
            call()
            said.append("")
        except EggrollError as error:
            said.append(str(error))
    assert all(len(text) < 1000 for text in said), "what was read is not quoted in full"
    return said


def put(path, place, value):
    """Put the text of a value in a place of the last line of a file."""
    *lines, last = path.read_text().splitlines()
    values = json.loads(last)
    inner = values
    *outer, name = place.split(".")
    for key in outer:
        inner = inner[key]
    inner[name] = "@@"
    path.write_text("\n".join([*lines, json.dumps(values).replace('"@@"', value)]) + "\n")


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:8])
@pytest.mark.parametrize("name", PLACES)
def test_a_wrong_value_in_any_place(restored, name, value):
    for place in PLACES[name]:
        put(restored() / name, place, value)
        texts_of(Path("base"))


@pytest.mark.parametrize("name", PLACES)
def test_something_is_missing(restored, name):
    for place in PLACES[name]:
        path = restored() / name
        *lines, last = path.read_text().splitlines()
        values = json.loads(last)
        *outer, key = place.split(".")
        inner = values
        for step in outer:
            inner = inner[step]
        inner.pop(key, None)
        path.write_text("\n".join([*lines, json.dumps(values)]) + "\n")
        texts_of(Path("base"))


@pytest.mark.parametrize("content", [b"\xff\xfe\x00" * 50, b"", DEEP.encode(), b"null\n" * 3])
@pytest.mark.parametrize("name", PLACES)
def test_a_file_of_something_else(restored, name, content):
    (restored() / name).write_bytes(content)
    texts_of(Path("base"))


def test_what_is_said(restored):
    """The messages of some of them."""
    expected = {
        ("config.json", "options.lr", "null"): (
            3,
            "base/config.json cannot be read as settings: lr (=null) must be a number",
        ),
        ("updates.jsonl", "shaped_fitness", '["a"]'): (0, "base/updates.jsonl, line 3 is not an update record ("),
        ("updates.jsonl", "generation", "7"): (
            3,
            "base/updates.jsonl, line 3 is of generation 7, expected 2; a part is",
        ),
        ("updates.jsonl", "lr", HUGE): (2, "'lr' must be a finite number, not a number out of range"),
        ("metrics.jsonl", "fitness_mean", '"high"'): (0, "line 4: 'fitness_mean' must be a finite number or null, not"),
        ("metrics.jsonl", "steps", '"many"'): (3, "base/metrics.jsonl, generation 3: 'steps' must be a finite number"),
        ("samples.jsonl", "prompt", DEEP): (0, "base/samples.jsonl, line 3 is not a JSON object: '{"),
        ("environment.json", "resumed", "5"): (3, "base/environment.json: 'resumed' must be a list of objects, not 5"),
    }
    for (name, place, value), (which, text) in expected.items():
        put(restored() / name, place, value)
        assert text in texts_of(Path("base"))[which], (name, place)
    (restored() / "updates.jsonl").write_bytes(b"\x00\xff\n")
    assert "base/updates.jsonl, line 1 is not an update record ('utf-8' codec" in texts_of(Path("base"))[0]


def test_records_of_a_larger_population(restored):
    path = restored() / "updates.jsonl"
    put(path, "shaped_fitness", json.dumps([0.5] * 40))
    text = (
        "base/updates.jsonl, generation 2: it has 40 weights, and the run 4 members; the log or config.json was changed"
    )
    assert [text in said for said in texts_of(Path("base"))] == [False, False, True, True]


def test_curves_of_numbers_that_nobody_expects(restored):
    path = restored() / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, value in zip(lines, (1e308, -1e308, 5e-324, 0.0), strict=True):
        line |= {"fitness_mean": value, "heldout_reward": value, "elapsed_s": abs(value), "$\\frac": value, "": value}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = plots_of(write_report(RunDir.open("base")))
    numbers = [value for plot in drawn for trace in plot["traces"] for value in (*trace["y"], *trace["x"]["time"])]
    assert drawn
    assert all(abs(value) < 1e300 for value in numbers)


def test_depth_is_bounded_and_text_is_not():
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    assert parse(json.dumps({"text": "[" * 1000})) == {"text": "[" * 1000}
    assert parse(json.dumps([[1]] * 1000)) == [[1]] * 1000
