"""Kills a run at random moments and continues it, then makes the same run in one go. Started by test_resume.py.

Libraries are loaded once and every attempt is a fork, so that a kill is likely to hit the run itself.
"""

import contextlib
import os
import random
import signal
import sys
import time

import torch
import transformers

import eggroll.llm.kind
import eggroll.run.report
from eggroll.cli.main import main
from eggroll.run.run_dir import RunDir

TUNE = ["tune", "tiny", "-r", "score.py", "--prompts", "prompts.txt", "--eval-prompts", "held.txt", "-p", "4"]
TUNE += ["--max-tokens", "4", "--batch-size", "2", "--dtype", "float32", "--sigma", "0.05", "--lr", "0.02"]
TUNE += ["--eval-every", "3", "--checkpoint-every", "2", "--report-to", "none", "-g", "24"]


def attempt(arguments):
    """A run in a process of its own; returns its id."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        status = main(arguments)
    os._exit(status)


def finished(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_run(kills, rng):
    """Kills ``kills`` times, each a little after the generation before, then lets the run end."""
    arguments, done = [*TUNE, "-o", "killed"], 0
    moments = []
    while done < kills:
        process = attempt(arguments)
        target = done * 2 + 1  # wait for this generation, then for a random part of the next ones
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and generations() < target:
            if os.waitpid(process, os.WNOHANG)[0]:
                raise AssertionError(f"the run ended by itself after {generations()} generations")
            time.sleep(0.002)
        time.sleep(rng.random() * 0.08)
        os.kill(process, signal.SIGKILL)
        assert finished(process) == -signal.SIGKILL
        done += 1
        moments.append(generations())
        arguments = ["tune", "--resume", "killed"]
    print(f"kills: {done}, after generations {moments}")
    assert finished(attempt(arguments)) == 0


def generations():
    try:
        return len(RunDir.open("killed").updates())
    except Exception:
        return -1


if __name__ == "__main__":
    torch.set_num_threads(1)
    # loaded before the forks
    assert eggroll.llm.kind.KIND
    assert eggroll.run.report.write_report
    assert transformers.LlamaForCausalLM
    assert transformers.AutoTokenizer
    assert transformers.GenerationConfig
    killed_run(int(sys.argv[1]), random.Random(0))
    assert finished(attempt([*TUNE, "-o", "whole"])) == 0
