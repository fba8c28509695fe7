"""Runs on vLLM that are killed: the run itself, and an engine that lives in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from eggroll.cli.main import main
from eggroll.run.run_dir import RunDir

pytestmark = pytest.mark.slow  # several processes, each of which loads vLLM

ROWS = "What is red?\nName a fish.\nSay hi.\nCount to three.\n"
TUNE = ["tune", "tiny", "--backend", "vllm", "-r", "score.py", "--prompts", "prompts.txt", "-p", "4", "--rank", "1"]
TUNE += ["--max-tokens", "8", "--batch-size", "2", "--dtype", "float32", "--sigma", "0.05", "--lr", "0.02", "-g", "6"]
TUNE += ["--checkpoint-every", "2", "--max-length", "64", "--report-to", "none", "--eval-prompts", "prompts.txt"]
KILLED_ENGINE = """
import os, signal, sys
from eggroll import EggrollConfig
from eggroll.errors import ModelError
from eggroll.vllm_backend import VllmEggrollTrainer

def main():
    config = EggrollConfig(population_size=4, rank=1, generations=3, max_tokens=4, max_length=64, eval_every=0)
    import psutil
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    def reward(prompts, completions):
        for child in psutil.Process().children(recursive=True):
            if child.pid not in before and "EngineCore" in " ".join(child.cmdline()) + child.name():
                child.send_signal(signal.SIGKILL)
        return [0.0] * len(completions)
    trainer = VllmEggrollTrainer("tiny", config, reward, dtype="float32")
    try:
        trainer.evolve(prompts=["Say hi."])
    except ModelError as error:
        print("MESSAGE", error)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def work(tmp_path, tiny, monkeypatch):
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "prompts.txt").write_text(ROWS)
    (tmp_path / "score.py").write_text("def score(text):\n    return float(sum(map(ord, text)) % 97)\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "eggroll.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "150"},
    )


def test_a_killed_run_goes_on_as_if_nothing_had_happened(work, capfd):
    """SIGKILL after three generations or later; what is left is resumed, and equals a run in one go and a replay."""
    process = start(*TUNE, "-o", "killed")
    log = work / "killed" / "updates.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(RunDir.open("killed").updates()) < 6
    assert main(["tune", "--resume", "killed"]) == 0
    assert main([*TUNE, "-o", "whole"]) == 0
    assert "members are LoRA adapters of one vLLM engine" in capfd.readouterr().out
    killed, whole = RunDir.open("killed"), RunDir.open("whole")
    assert (killed.path / "updates.jsonl").read_bytes() == (whole.path / "updates.jsonl").read_bytes()
    mine, theirs = (run.latest_checkpoint().load() for run in (killed, whole))
    assert list(mine) == list(theirs)
    assert all(mine[name].equal(theirs[name]) for name in mine)
    assert json.loads((whole.path / "environment.json").read_text())["device"].startswith("vLLM")
    # a replay is made in PyTorch, without vLLM
    assert main(["replay", "whole", "--to", "6", "-o", "replayed"]) == 0
    replayed, *saved = (
        load_file(f"{folder}/model.safetensors") for folder in ("replayed", "killed/model", "whole/model")
    )
    assert all(torch.equal(replayed[name], model[name]) for name in replayed for model in saved)


def test_an_engine_in_its_own_process_that_dies_is_a_clear_error(work):
    (work / "script.py").write_text(KILLED_ENGINE)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert "MESSAGE the vLLM engine died" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    assert "continue it with --resume" in done.stdout
