"""``eggroll tune --workers``: real Ray workers, one of which is killed; the result is that of one worker."""

import json

import pytest

pytest.importorskip("ray")

KILLS_ITS_WORKER_ONCE = """
import os, signal
from pathlib import Path

HERE = Path(__file__).parent

def score(text):
    with open(HERE / "calls", "a") as calls:
        calls.write("x")
    if (HERE / "calls").stat().st_size > 3:  # beyond the two held-out answers at the start: in a generation
        try:
            (HERE / "armed").unlink()  # only one worker gets it
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return -float(sum(map(ord, text)) % 97)
"""


TWO_PARTS = ["--engine-args", '{"tensor_parallel_size": 2}']


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_number_of_workers_and_a_killed_one_change_nothing(eggroll, work):
    (work / "score.py").write_text(KILLS_ITS_WORKER_ONCE)
    common = ["--eval-prompts", "held.txt", "-g", "3", "--eval-every", "2", "--optimizer", "sgd"]
    one = eggroll.tune(*common, "--workers", "1", "-o", "one")
    assert one.status == 0, one.out + one.err
    assert "1 worker" in one.out
    assert "workers on this machine, each with 1 CPU and a replica of the model" in one.out
    (work / "calls").unlink()
    (work / "armed").write_text("")
    two = eggroll.tune(*common, "--workers", "2", "-o", "two")
    assert two.status == 0, two.out + two.err
    assert not (work / "armed").exists()
    assert "died" in two.out
    assert (work / "one" / "updates.jsonl").read_bytes() == (work / "two" / "updates.jsonl").read_bytes()
    models = [(work / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert models[0] == models[1]
    metrics = [line for line in lines(work / "two" / "metrics.jsonl") if "workers" in line]
    assert [line["generation"] for line in metrics] == [1, 2, 3]
    assert all(0 < line["sent_bytes"] + line["received_bytes"] < 50_000 for line in metrics)
    assert sum(line["ranges_repeated"] for line in metrics) >= 1
    # more generations, on another number of workers; a run on workers is not continued without them
    refused = eggroll("tune", "--resume", "two", "-g", "4", "--workers", "None")
    assert refused.status == 1
    assert "was started with --workers 2" in refused.err
    more = eggroll("tune", "--resume", "two", "-g", "4", "--workers", "1")
    assert more.status == 0, more.out + more.err
    assert len(lines(work / "two" / "updates.jsonl")) == 4


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--ray-address", "auto"], "--ray-address is for runs on workers; say how many with --workers N"),
        (["--worker-cpus", "2"], "--worker-cpus is for runs on workers"),
        (["--workers", "0"], r"workers (=0) must be a whole number of at least 1"),
        (["--workers", "2", "--ray-address", "127.0.0.1:1"], "127.0.0.1:1"),
        (["--engine-args", "{}"], "--engine-args are arguments of vllm.LLM; they need --backend vllm"),
        (["--backend", "vllm", "--engine-args", "[1]"], "must be a JSON object, it is a list"),
        (["--backend", "vllm", "--engine-args", "{max_loras: 3}"], "must be a JSON object"),
        (["--workers", "2", "--worker-gpus", "2"], "a replica in PyTorch computes on one GPU"),
        (
            ["--backend", "vllm", "--workers", "2", "--worker-gpus", "1", *TWO_PARTS],
            "gpus_per_worker (=1); use",
        ),
        (["--backend", "vllm", "--vectors"], "layernorm.weight"),
        (["--backend", "vllm", "-r", "perplexity"], "needs the model's likelihoods or the model itself"),
    ],
)
def test_what_cannot_work_is_said_before_a_run_is_made(flags, text, eggroll, work):
    done = eggroll.tune(*flags, "-o", "run")
    assert done.status == 1, done.out
    assert text in done.err
    assert not (work / "run").exists()
