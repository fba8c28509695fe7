"""The comparison of quantized formats: runs are made, resumed and kept, and the table compares the same seeds."""

import json
import sys

import pytest


@pytest.fixture
def learning(load):
    return load("quantized/learning")


def write_run(run, values):
    (run / "model").mkdir(parents=True)
    (run / "model" / "eggroll.json").write_text("{}")
    lines = [{"generation": g, "heldout_reward": v, "evaluate_s": 2.0, "update_s": 0.5} for g, v in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_commands_of_new_and_cut_off_runs(learning, tmp_path):
    variant = next(variant for variant in learning.VARIANTS if variant.name == "GGUF Q4_1, nearest")
    run = learning.directory_of(tmp_path, variant, 43)
    made = learning.command_of(run, variant, 43, ["-g", "2"])
    assert made[2:6] == ["eggroll.cli.main", "tune", "smollm2-135m", "--task"]
    assert " ".join(made).count("--quantize gguf --quantized-update nearest") == 1
    assert made[-2:] == ["-g", "2"]
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert learning.command_of(run, variant, 43, [])[-2:] == ["--resume", str(run)]


def test_the_table_compares_equal_seeds(learning, tmp_path, monkeypatch, capsys):
    base, int8 = learning.VARIANTS[:2]
    for seed, gain in ((42, 0.2), (43, 0.4)):
        write_run(learning.directory_of(tmp_path, base, seed), [0.5, 0.6, 0.5 + gain])
    write_run(learning.directory_of(tmp_path, int8, 43), [0.5, 0.55, 0.8])
    monkeypatch.setattr(learning, "command_of", lambda *a: pytest.fail("no run is to be made"))
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    settings = ["--folder", str(tmp_path), "--minutes", "0", "--write"]
    monkeypatch.setattr(sys, "argv", ["learning.py", *settings])
    learning.main()
    (result,) = (tmp_path / "quantized").glob("*.json")
    rows = {row["variant"]: row for row in json.loads(result.read_text())["summary"]}
    assert rows.keys() == {"bfloat16", "int8"}
    assert rows["int8"]["part_of_bfloat16"] == pytest.approx(0.75)  # of seed 43 alone
    assert rows["bfloat16"]["gain"] == pytest.approx(0.3)
    assert rows["int8"]["median_generation_s"] == 2.5
    assert result.with_suffix(".png").stat().st_size > 10_000
    assert "of bfloat16's 0.75" in capsys.readouterr().out
