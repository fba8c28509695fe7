"""A run that is killed, or fills the disk. Started by test_crash.py in a process of its own; exits 0 if all is well.

crash_script.py kill DIR     SIGKILL at random moments, many times, resuming each time
crash_script.py steps DIR    the process ends before its k-th system call that changes files, for every k
crash_script.py full DIR     DIR is on a small file system
crash_script.py limit DIR    a limit on the size of files
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from eggroll.core.records import UpdateRecord
from eggroll.errors import RunWriteError
from eggroll.run import RunDir
from eggroll.run.replay import replay_run


def record(generation: int, size: int = 8) -> UpdateRecord:
    weights = np.random.default_rng(generation).standard_normal(size).astype(np.float32)
    return UpdateRecord.make(generation, 0.01, 0.1, weights)


def updated(params: torch.Tensor, update: UpdateRecord) -> torch.Tensor:
    """Stands for an update: depends on the order, so that a lost or repeated one shows."""
    return params * 1.01 + float(update.weights.sum())


def truth(generation: int) -> torch.Tensor:
    params = torch.zeros(100)
    for index in range(generation):
        params = updated(params, record(index))
    return params


def start_or_resume(path: Path) -> tuple[RunDir, int, torch.Tensor]:
    run = RunDir.open(path) if (path / "config.json").exists() else RunDir.create(path, {"a": 1}, command=[])
    finished = len(run.updates())
    state = {"params": torch.zeros(100)}
    latest = run.latest_checkpoint()
    if latest is not None:
        state = latest.load()

    def apply(update: UpdateRecord) -> None:
        state["params"] = updated(state["params"], update)

    replay_run(run, apply, start=latest.generation if latest else 0)
    run.rewind(finished)
    return run, finished, state["params"]


def train(path: Path, stop: int, *, every: int = 1, acknowledge: int | None = None) -> None:
    run, generation, params = start_or_resume(path)
    while generation < stop:
        update = record(generation)
        params = updated(params, update)
        generation += 1
        run.append_samples([{"generation": generation, "text": "x" * 200}] * 2)
        run.append_metrics({"generation": generation, "fitness_mean": 0.5})
        run.append_update(update)
        if acknowledge is not None:
            os.write(acknowledge, b".")
        if generation % every == 0:
            run.save_checkpoint(generation, {"params": params}, {"generation": generation})


def check(path: Path, at_least: int) -> int:
    """The directory opens, its log is a prefix of the truth, and nothing that was acknowledged is missing."""
    if not (path / "config.json").exists():
        assert at_least == 0
        return 0
    run = RunDir.open(path)
    records = run.updates()
    assert records == [record(generation) for generation in range(len(records))]
    assert len(records) >= at_least, f"{at_least} generations were finished, {len(records)} are left"
    measured = [line["generation"] for line in run.metrics()]
    assert measured in (list(range(1, len(records) + 1)), list(range(1, len(records) + 2))), measured
    run.samples()
    latest = run.latest_checkpoint()
    if latest is not None:
        assert latest.generation <= len(records)
        assert torch.equal(latest.load()["params"], truth(latest.generation))
        assert latest.manifest == {"generation": latest.generation}
    return len(records)


def child(work) -> int:
    """Fork (torch is imported once) and run ``work`` there. Returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def kill(path: Path) -> None:
    rng = random.Random(0)
    finished = killed = 0
    # 40 moments; on a busy machine, where hardly a generation is done between two of them, more and further apart
    while killed < 40 or (killed < 400 and (finished < 6 or RunDir.open(path).latest_checkpoint() is None)):
        reader, writer = os.pipe()
        pid = child(lambda writer=writer: train(path, 10_000, every=3, acknowledge=writer))
        os.close(writer)
        time.sleep(rng.uniform(0.0, 0.08) * (1 + killed // 40))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself with status {status}"
        killed += 1
        acknowledged = 0
        while data := os.read(reader, 1 << 16):
            acknowledged += len(data)
        os.close(reader)
        finished = check(path, finished + acknowledged)
    run, generation, params = start_or_resume(path)
    assert torch.equal(params, truth(generation))
    assert run.latest_checkpoint() is not None
    print(f"killed {killed} times, {finished} generations")
    assert finished > 5


def steps(path: Path) -> None:
    changing = ("open", "write", "fsync", "replace", "rename", "ftruncate", "unlink", "rmdir", "mkdir", "chmod")
    count = 0
    while True:
        directory = path / str(count)

        def work(directory=directory, count=count) -> None:
            left = count

            def counted(call):
                def replacement(*arguments, **keywords):
                    nonlocal left
                    if left == 0:
                        os._exit(77)
                    left -= 1
                    return call(*arguments, **keywords)

                return replacement

            for name in changing:
                setattr(os, name, counted(getattr(os, name)))
            train(directory, 3)  # the third checkpoint removes the first
            train(directory, 4)  # a resume

        _, status = os.waitpid(child(work), 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 77), f"ended with {code} at call {count}"
        check(directory, 0)
        train(directory, 5)
        assert check(directory, 5) == 5
        leftovers = [str(file) for file in directory.rglob("*.part")]
        assert not leftovers, f"left after a crash before call {count}: {leftovers}"
        if code == 0:
            break
        count += 1
    print(f"crashed before each of {count} calls")
    assert count > 100


def fails_with(call, text: str) -> str:
    with pytest.raises(RunWriteError, match=re.escape(text)) as caught:
        call()
    return str(caught.value)


def survives(path: Path, run: RunDir, text: str, big: int, end_shortage) -> None:
    """With too little room, appends and checkpoints fail clearly and change nothing; with room again, all goes on."""
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    print(fails_with(lambda: run.append_update(record(4, 50_000)), text))
    print(fails_with(lambda: run.append_metrics({"generation": 5, "x": "x" * 500_000}), text))
    print(fails_with(lambda: run.append_samples([{"generation": 5, "x": "x" * 1000}] * 500), text))
    print(fails_with(lambda: run.save_checkpoint(4, {"params": torch.zeros(big)}, {}), text))
    print(fails_with(lambda: run.save_checkpoint(4, {}, {"large": "x" * 500_000}), text))
    print(fails_with(lambda: run.update_config({"a": "x" * 500_000}), text))
    print(fails_with(lambda: run.write_file("report.html", b"x" * 500_000), text))
    after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert after == before, after.keys() ^ before.keys()
    check(path, 4)
    end_shortage()
    run.append_metrics({"generation": 5, "fitness_mean": 0.5})
    run.append_update(record(4))
    run.save_checkpoint(5, {"params": truth(5)}, {"generation": 5})
    check(path, 5)


def full(path: Path) -> None:
    train(path / "run", 4, every=2)
    run = RunDir.open(path / "run")
    hog = path / "hog"
    descriptor = os.open(hog, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, b"x" * 4096)
    except OSError:
        os.close(descriptor)
    survives(run.path, run, "the disk is full (No space left on device; 0.0 MiB free). ", 100_000, hog.unlink)


def limit(path: Path) -> None:
    train(path, 4, every=2)
    run = RunDir.open(path)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    def end_shortage() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    survives(path, run, "a limit on the size of files is in force (File too large). ", 100_000, end_shortage)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kill": kill, "steps": steps, "full": full, "limit": limit}[sys.argv[1]](Path(sys.argv[2]))
