"""``eggroll pretrain`` from the command line: a run, a sample, a resume, a replay, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from eggroll.cli.main import main
from eggroll.run.run_dir import RunDir


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat. " * 400)
    return file


def command(text, *more):
    small = (
        "--pop_size 16 --n_layers 1 --hidden 16 --eval-every 2 --eval-tokens 200 --sample-length 20 --report-to none"
    )
    return ["pretrain", "--data", str(text), *small.split(), *more]


def test_a_run_a_sample_and_a_replay(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(text, "-g", "4", "-o", str(out))) == 0
    shown = capsys.readouterr().out
    for piece in ("1 layer x 16", "int8 parameters", "validation bits per byte", "unigram bits per byte", "--sample"):
        assert piece in shown
    result = json.loads((out / "result.json").read_text())
    assert result["member_tokens"] == 4 * 16 * 16
    assert 0 < result["order_1_bits_per_byte"] < result["unigram_bits_per_byte"] < 8
    assert main(["pretrain", "--sample", str(out), "--prompt", "the \x1b", "--sample-length", "30"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("the ")
    assert main(["replay", str(out)]) == 0
    assert "generation 4 of 4, equal to its checkpoint, bit for bit" in capsys.readouterr().out


def test_the_report_speaks_of_bits_and_of_minutes(text, tmp_path):
    out = tmp_path / "run"
    assert main(command(text, "-g", "100000", "--minutes", "0.0001", "-o", str(out))) == 0
    page = (out / "report.html").read_text()
    assert "The run ended after 1 of 100000 generations: its 0.0001 minutes were used up." in page
    assert "bits per byte, first → last" in page
    assert "bits per byte of held-out text (lower is better)" in page
    assert f"eggroll pretrain --sample {out} --prompt" in page
    for wrong in ("not finished", "No model was saved", "held-out reward", "reward on", "reward -", "reward none"):
        assert wrong not in page, wrong
    (out / "result.json").write_text('{"generations": 7}')  # of another time
    assert main(["report", str(out)]) == 0
    assert "The run is not finished: 1 of 100000 generations." in (out / "report.html").read_text()


def test_resume_is_bit_for_bit(text, tmp_path):
    from safetensors.numpy import load_file

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(command(text, "-g", "5", "-o", str(whole))) == 0
    assert main(command(text, "-g", "2", "-o", str(cut))) == 0
    assert main(["pretrain", "--resume", str(cut), "-g", "5", "--report-to", "none"]) == 0
    one, two = (
        load_file(next((run / "checkpoints" / "generation-000005").glob("*.safetensors"))) for run in (whole, cut)
    )
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])
    assert (whole / "updates.jsonl").read_text() == (cut / "updates.jsonl").read_text()


def test_a_used_up_time_stays_used_up(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(text, "-g", "50", "--minutes", "1e-6", "-o", str(out))) == 0
    assert len(RunDir.open(out).updates()) == 1
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(out)]) == 0
    assert "--minutes M    (in all: 1e-06 minutes are over after generation 1 of 50)" in capsys.readouterr().out
    assert len(RunDir.open(out).updates()) == 1
    assert main(["pretrain", "--resume", str(out), "--minutes", "9", "-g", "3"]) == 0
    assert len(RunDir.open(out).updates()) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--pop_size", "7"), "population_size (=7) must be even"),
        (("--tokens", "100000"), "text.txt"),
        (("--noise-table-size", "10"), "table"),
        (("--device", "gpu0"), "device (='gpu0') must be auto, cpu, cuda, cuda:1, mps"),
        (("--threads", "-1"), "threads (=-1) must be at least 1"),
        (("--members-per-forward", "0"), "members_per_forward (=0) must be at least 1"),
        (("--backend", "c", "--device", "cuda"), "backend='c' runs on the CPU, not on device='cuda'"),
        (("--alpha", "1e-17"), "alpha (=1e-17) must be at least 1e-09"),
    ],
)
def test_errors_say_what_to_do(text, tmp_path, capsys, more, message):
    try:
        status = main(command(text, "-g", "1", "-o", str(tmp_path / "run"), *more))
    except SystemExit as error:  # settings that contradict each other are refused while they are read
        status = error.code
    assert status in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_floating_point_is_replayed_in_floating_point(text, tmp_path, capsys):
    from safetensors.torch import load_file

    out = tmp_path / "run"
    assert main(command(text, "-g", "3", "-o", str(out), "--precision", "fp32", "--threads", "1")) == 0
    assert "fp32 parameters" in capsys.readouterr().out
    assert main(["replay", str(out)]) == 0
    assert "generation 3 of 3, equal to its checkpoint, bit for bit" in capsys.readouterr().out
    assert {value.dtype.is_floating_point for value in load_file(out / "replay-3" / "model.safetensors").values()} == {
        True
    }


def test_resume_refuses_other_settings(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(text, "-g", "1", "-o", str(out))) == 0
    capsys.readouterr()
    assert main(["pretrain", "--resume", str(out), "--hidden", "32"]) == 1
    assert "hidden: 16 in the run, 32 now" in capsys.readouterr().err
