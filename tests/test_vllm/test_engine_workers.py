"""vLLM engines as the workers of a Ray pool: their number, and a death, change nothing."""

import dataclasses

import pytest
import torch

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.distributed.crew import WorkerWarning

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # each worker loads vLLM, on whatever cores are free

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three."]
CONFIG = EggrollConfig(
    population_size=8, rank=1, sigma=0.05, lr=0.01, generations=3, max_tokens=8, max_length=128,
    prompts_per_generation=2, eval_every=0, seed=3,
)  # fmt: skip


def killing(marker):
    """A reward that ends its own worker, or the second process of its worker's engine, once in a run."""

    def reward(prompts, completions):
        import os
        import signal

        import psutil

        scores = [float(sum(map(ord, text)) % 97) for text in completions]
        for victim in ("worker", "engine"):
            try:
                marker.with_suffix(f".{victim}").unlink()
            except FileNotFoundError:
                continue
            parts = [child.pid for child in psutil.Process().children(recursive=True) if "TP1" in child.name()]
            os.kill(os.getpid() if victim == "worker" else parts[0], signal.SIGKILL)
        return scores

    return reward


def evolve(model, config, reward, **options):
    made = EggrollTrainer.from_model_id(str(model), config, reward, backend="vllm", dtype="float32", **options)
    with made as trainer:
        trainer.worker.use(PROMPTS)
        trainer.worker.pool.wait_until_ready(options["workers"])
        history = trainer.evolve(PROMPTS)
        state = {name: value.clone() for name, value in trainer.worker.state_tensors().items()}
    return [line["fitness_mean"] for line in history], state, sum(line["ranges_repeated"] for line in history)


def same(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_two_engines_are_as_good_as_one_and_a_killed_one_is_replaced(tiny, tmp_path):
    """Bit for bit: ranges of members depend on the population alone, and each is one call of one engine."""
    marker = tmp_path / "kill"
    scores, state, repeated = evolve(tiny, CONFIG, killing(marker), workers=1)
    assert repeated == 0
    assert len(set(scores)) == len(scores)
    marker.with_suffix(".worker").touch()
    with pytest.warns(WorkerWarning, match="is gone"):
        again, other, repeated = evolve(tiny, CONFIG, killing(marker), workers=2)
    assert repeated >= 1
    assert again == scores
    assert same(other, state)


def test_an_engine_in_two_processes_is_replaced_when_it_loses_one(tiny, tmp_path):
    config = dataclasses.replace(CONFIG, generations=2)
    marker, parallel = tmp_path / "kill", {"tensor_parallel_size": 2}
    marker.with_suffix(".engine").touch()
    with pytest.warns(WorkerWarning, match="is gone .*the vLLM engine died"):
        scores, state, _ = evolve(tiny, config, killing(marker), workers=1, engine_args=parallel)
    again, other, _ = evolve(tiny, config, killing(marker), workers=1, engine_args=parallel)
    assert again == scores
    assert same(other, state)
