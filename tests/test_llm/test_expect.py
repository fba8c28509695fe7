"""What a run says before it takes the memory and the time that it takes."""

import warnings

import pytest
import torch

from eggroll import EggrollConfig, EggrollTrainer, TextReward
from eggroll.llm.estimate import expect
from eggroll.llm.estimate.expect import SlowGenerationWarning, announce_if_slow, expectation
from eggroll.llm.estimate.memory import Estimate, Workload
from eggroll.llm.models.outline import Outline


def test_tokens_passes_and_memory(tiny_model):
    config = EggrollConfig(population_size=100_000, rank=1)
    estimate = Estimate.of(Outline.of(tiny_model), config, torch.float32)
    loads = [Workload(3, 10, 6), Workload(3, 20)]
    line = expectation(estimate, loads, 64, None)
    assert line.startswith("a generation is at most 10,800,000 tokens in 1,563 passes of 64 members; about ")
    peak = max(estimate.memory(load, 64).peak for load in loads)
    assert expectation(estimate, loads, 64, peak) == line
    assert expectation(estimate, loads, 64, peak - 1).startswith(f"{line}, which is more than the ")


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (2.0, "took 2 s, so a generation takes about 52 minutes and 100 of them 4 days"),
        (60.0, "took 60 s, so a generation takes about 26 hours and 100 of them 109 days"),
        (0.5, None),
    ],
)
def test_a_slow_generation_is_announced(seconds, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        announce_if_slow(seconds, 64, 100_000, 100)
    texts = [str(one.message).split(". ")[0] for one in caught]
    assert texts == ([f"the first 64 of 100,000 members {told}"] if told else [])


def test_a_trainer_announces_it_once(tiny_model, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(expect, "SLOW_S", 0.0)
    config = EggrollConfig(population_size=6, rank=1, generations=2, max_tokens=2, members_per_forward=2)
    trainer = EggrollTrainer(tiny_model, config, TextReward(scorer=len), tiny_tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.evolve(["a"])
    assert len([one for one in caught if one.category is SlowGenerationWarning]) == 1
    assert trainer.worker.expectation().startswith("a generation is at most ")
    assert " in 3 passes of 2 members; about " in trainer.worker.expectation()
