"""Runs: that they learn, are the same everywhere, go on where they were, and are refused where they cannot."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from eggroll.errors import ConfigError, DataError, RunError
from eggroll.pretrain import kind
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.worker import IntegerWorker
from eggroll.run.run_dir import RunDir


def params_of(worker):
    return worker.engine.params


def equal(first, second):
    return all(np.array_equal(params_of(first)[name], params_of(second)[name]) for name in params_of(first))


def test_a_tiny_model_falls_below_the_unigram_entropy(text_file, tmp_path):
    settings = PretrainOptions(
        data=str(text_file), hidden=16, n_layers=1, population_size=512, generations=60, tokens=8, context=4,
        eval_every=60, sample_every=0, alpha_decay=0.05, momentum_shift=1, noise_table_size=1 << 18,
        output=str(tmp_path / "run"), report_to="none",
    )  # fmt: skip
    before = kind.train(dataclasses.replace(settings, generations=0, output=str(tmp_path / "start"))).result
    result = kind.train(settings).result
    assert result["unigram_bits_per_byte"] > 3
    assert before["validation_bits_per_byte"] > 7
    assert result["validation_bits_per_byte"] < result["unigram_bits_per_byte"] - 0.5


def test_a_run_leaves_what_it_promises(options):
    done = kind.train(options)
    run = RunDir.open(options.output)
    assert json.loads((run.path / "result.json").read_text()) == done.result
    assert done.result["generations"] == 6
    assert done.result["member_tokens"] == 6 * 64 * 6
    lines = [line for line in run.metrics() if "evaluate_s" in line]
    assert len(lines) == 6
    assert all(0 <= line["ties"] <= 1 and line["tokens_per_s"] > 0 for line in lines)
    assert ["update_cosine" in line for line in lines] == [False] + [True] * 5
    assert all(-1 <= line["update_cosine"] <= 1 and line["memory_bytes"] > 2**20 for line in lines[1:])
    assert -9 < lines[0]["fitness_mean"] < -7  # bits per byte, the larger the better
    assert [line["generation"] for line in run.metrics() if "validation_bits_per_byte" in line] == [0, 2, 4, 6]
    record = run.updates()[3]
    assert record.lr == pytest.approx(1 / 1.045)
    assert record.sigma == 1 / 16
    assert len(record.shaped_fitness) == 32  # a number per pair
    assert set(record.shaped_fitness) <= {-1.0, 0.0, 1.0}
    assert all(len(row["completion"]) <= 5 for row in run.samples())
    assert len(run.samples()) >= 3


def test_results_do_not_depend_on_the_engine(options, tmp_path):
    first = kind.train(options)
    others = [dict(backend="torch"), dict(threads=1, members_per_forward=6)]
    for number, changes in enumerate(others):
        settings = dataclasses.replace(options, output=str(tmp_path / f"other{number}"), **changes)
        assert equal(kind.train(settings).worker, first.worker)


@pytest.mark.parametrize("changes", [{}, {"noise": "counter", "rank": 2}, {"fitness": "normalized", "group_size": 4}])
def test_a_resumed_run_ends_the_same(options, tmp_path, changes):
    options = dataclasses.replace(options, **changes)
    whole = kind.train(options)
    part = dataclasses.replace(options, generations=3, output=str(tmp_path / "part"))
    kind.train(part)
    resumed = dataclasses.replace(kind.options_of_run(part.output), resume=part.output, generations=6)
    again = kind.train(resumed)
    assert equal(again.worker, whole.worker)
    assert again.generation == 6
    momentum = [worker.engine.momentum for worker in (again.worker, whole.worker)]
    assert all(np.array_equal(momentum[0][name], momentum[1][name]) for name in momentum[1])
    assert RunDir.open(part.output).updates() == RunDir.open(options.output).updates()


def test_every_generation_can_be_replayed(options):
    whole = kind.train(options)
    assert equal(kind.model_of_run(options.output), whole.worker)
    run = RunDir.open(options.output)
    rebuilt = IntegerWorker(options)
    for record in run.updates():
        rebuilt.apply(record)
    assert equal(rebuilt, whole.worker)
    third = kind.model_of_run(options.output, generation=3)
    assert not equal(third, whole.worker)
    with pytest.raises(RunError, match="holds 6 finished generations"):
        kind.model_of_run(options.output, generation=7)


def test_what_cannot_be_resumed(options, text_file, tmp_path):
    kind.train(options)
    again = dataclasses.replace(options, resume=options.output)
    with pytest.raises(RunError, match=r"hidden: 16 in the run, 4 now"):
        kind.train(dataclasses.replace(again, hidden=4))
    with pytest.raises(ConfigError, match="6 finished generations already"):
        kind.train(dataclasses.replace(again, generations=5))
    text_file.write_bytes(b"something else altogether. " * 200)
    with pytest.raises(RunError, match="data fingerprint"):
        kind.train(again)
    RunDir.create(tmp_path / "other", {"kind": "rl"})
    with pytest.raises(RunError, match="is a run of eggroll rl, so eggroll pretrain cannot continue it"):
        kind.options_of_run(str(tmp_path / "other"))


def test_text_shorter_than_the_context(options):
    with pytest.raises(DataError, match="fewer than one window of 1007"):
        kind.train(dataclasses.replace(options, context=1000))


@pytest.mark.parametrize("device", ["gpu0", "cuda:99"])
def test_a_device_that_is_not_there_leaves_no_run_and_spoils_none(options, device):
    with pytest.raises(ConfigError, match=f"device .='{device}'"):
        kind.train(dataclasses.replace(options, device=device))
    assert not Path(options.output).exists()
    kind.train(dataclasses.replace(options, generations=2))
    again = dataclasses.replace(options, resume=options.output, device=device)
    with pytest.raises(ConfigError, match=f"device .='{device}'"):
        kind.train(again)
    run = RunDir.open(options.output)
    stored = run.config["options"]
    assert stored["device"] == "auto"
    run.update_config({**run.config, "options": {**stored, "device": "cuda:7", "threads": 64}})  # of another machine
    assert kind.sample_run(options.output, "abc", 4) == kind.sample_run(options.output, "abc", 4, threads=1)


def test_a_run_of_an_older_version_goes_on(options):
    """Settings at the top of config.json, population_size as pop_size, and what is no setting any more."""
    whole = kind.train(dataclasses.replace(options, output=f"{options.output}-whole", generations=4))
    kind.train(dataclasses.replace(options, generations=2))
    run = RunDir.open(options.output)
    old = {name: value for name, value in run.config["options"].items() if name != "text_column"}
    size = old.pop("population_size")
    older = {"pop_size": size, "sample": None, "temperature": 1.0, "resume": None}
    fingerprint = run.config["data_fingerprint"]
    run.update_config({"kind": "pretrain", "data_fingerprint": fingerprint, **old, **older})
    found = kind.options_of_run(options.output)
    assert found == dataclasses.replace(options, generations=2)
    again = kind.train(dataclasses.replace(found, resume=options.output, generations=4))
    assert again.generation == 4
    assert equal(again.worker, whole.worker)


def test_a_run_that_ends_early_is_validated_on_everything(options):
    """After its minutes are over, and once more when there is nothing left to do."""
    short = dataclasses.replace(options, minutes=1e-9, eval_tokens=100, generations=50)
    done = kind.train(short)
    assert (done.generation, done.result["generations"]) == (1, 1)
    assert done.result["validation_bytes"] == 439
    resumed = dataclasses.replace(kind.options_of_run(options.output), resume=options.output)
    again = kind.train(resumed)
    assert again.generation == 1
    assert again.result["validation_bits_per_byte"] == done.result["validation_bits_per_byte"]
    assert kind.train(dataclasses.replace(resumed, minutes=10, generations=3)).generation == 3


def test_a_run_can_be_sampled(options):
    kind.train(options)
    text = kind.sample_run(options.output, "abc", 12, seed=3)
    assert text == kind.sample_run(options.output, "abc", 12, seed=3)
