"""The weights of any generation, from the base model and the log."""

import json
import re

import pytest
from safetensors.torch import load_file

from eggroll.run.run_dir import RunDir


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_generation(eggroll, dtype):
    arguments = ["--checkpoint-every", "1", "--dtype", dtype, "--optimizer", "momentum"]
    work = eggroll.work
    for generations in ("1", "2", "3"):
        assert eggroll.tune(*arguments, "-g", generations, "-o", f"run{generations}").status == 0
    for generation in (1, 2, 3):
        done = eggroll("replay", "run3", "--to", generation, "-o", f"replayed{generation}")
        assert done.status == 0, done.err
        kept = f"generation {generation} of 3, equal to its checkpoint, bit for bit"
        assert (kept in done.out) == (generation > 1)  # two checkpoints are kept
        mine, theirs = weights(work / f"replayed{generation}"), weights(work / f"run{generation}" / "model")
        assert list(mine) == list(theirs)
        assert all(mine[name].equal(theirs[name]) for name in mine)
        stored = RunDir.open(f"run{generation}").latest_checkpoint().load()
        evolved = {name: tensor for name, tensor in stored.items() if name.startswith("parameter/")}
        assert evolved
        assert all(mine[name.removeprefix("parameter/")].equal(tensor) for name, tensor in evolved.items())


def test_generation_0_is_the_base(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    done = eggroll("replay", "run", "--to", "0")
    assert done.status == 0
    assert "generation 0 of 2\n" in done.out
    assert 'load it  AutoModelForCausalLM.from_pretrained("run/replay-0")' in done.out
    mine, base = weights(eggroll.work / "run/replay-0"), weights(eggroll.work / "tiny")
    assert list(mine) == list(base)
    assert all(mine[name].equal(base[name]) for name in mine)


def test_the_last_generation_by_default(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    done = eggroll("replay", "run")
    assert done.status == 0
    assert "generation 2 of 2, equal to its checkpoint, bit for bit" in done.out
    details = json.loads((eggroll.work / "run/replay-2/eggroll.json").read_text())
    assert details["replayed_generations"] == 2
    assert details["config"]["max_tokens"] == 4  # with which `eggroll chat` asks it


def test_without_usable_checkpoints(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    (file,) = (eggroll.work / "run/checkpoints").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    done = eggroll("replay", "run")
    assert done.status == 0
    assert "generation 2 of 2, not compared with its checkpoint, which is damaged: " in done.out
    mine, theirs = weights(eggroll.work / "run/replay-2"), weights(eggroll.work / "run/model")
    assert all(mine[name].equal(theirs[name]) for name in theirs)


def test_a_log_that_was_changed_is_noticed(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    path = eggroll.work / "run/updates.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    del first["check"], second["check"]  # as in older logs
    first["shaped_fitness"] = [-value for value in first["shaped_fitness"]]
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    done = eggroll("replay", "run")
    assert done.status == 1
    assert done.err.startswith("error: the rebuilt weights of generation 2 differ from the run's checkpoint of it (")
    assert "another number of threads than the run's, which shows in the last digits" in done.err
    assert not (eggroll.work / "run/replay-2").exists()
    done = eggroll("replay", "run", "--allow-difference")
    assert done.status == 0
    assert re.search(r"generation 2 of 2, differs from its checkpoint \(\d+ of \d+ tensors, by up to 0.\d+\)", done.out)
    assert (eggroll.work / "run/replay-2/model.safetensors").exists()
    done = eggroll("replay", "run", "--to", "1")  # changed as well, and nobody can tell
    assert done.status == 0
    assert "generation 1 of 2, not compared: the run keeps no checkpoint of it\n" in done.out
    path.write_text(f"{json.dumps(second)}\n")
    done = eggroll("replay", "run")
    assert done.status == 1
    assert "updates.jsonl, line 1 is of generation 1, expected 0; a part is missing" in done.err


def test_generations_that_are_not_there(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    for generation in ("3", "-1"):
        done = eggroll("replay", "run", "--to", generation)
        assert done.status == 1
        text = f"generation {generation} cannot be rebuilt: the log holds 2 finished generations; choose 0 to 2"
        assert text in done.err
    done = eggroll("replay", "nowhere")
    assert done.status == 1
    assert done.err.startswith("error: nowhere does not exist.")


def test_the_report_is_written_again(eggroll):
    assert eggroll.tune("-g", "2", "-o", "run").status == 0
    (eggroll.work / "run/report.html").unlink()
    done = eggroll("report", "run")
    assert done.status == 0
    assert done.out == "report   run/report.html\n"
    assert "run/model" in (eggroll.work / "run/report.html").read_text()
    text = (eggroll.work / "run/report.html").read_text()
    assert '<tr class="changed"><td>sigma</td><td>0.05</td><td>auto</td></tr>' in text
    assert eggroll("report", "run", "-o", "page.html").out == "report   page.html\n"
    assert (eggroll.work / "page.html").read_text() == text


def test_several_runs_are_compared(eggroll):
    for name, lr in (("one", "0.02"), ("two", "0.5")):
        assert eggroll.tune("-g", "1", "--lr", lr, "-o", f"runs/{name}").status == 0
    assert eggroll("report", "runs/one", "runs/two").out == "report   comparison.html\n"
    text = (eggroll.work / "comparison.html").read_text()
    assert "<tr><td>lr</td><td>0.02</td><td>0.5</td></tr>" in text
    assert "runs/two/model" in text
    shown = eggroll("runs").out.splitlines()
    assert {tuple(line.split()[:5]) for line in shown[1:]} == {
        (name, "tune", "tiny", "score.py", "1/1") for name in ("one", "two")
    }
    done = eggroll("report")
    assert done.status == 1
    assert done.err.startswith("error: report needs the directory of a run, or of several: ")
    assert eggroll("report", "runs/one", "gone").err.startswith("error: gone does not exist.")
