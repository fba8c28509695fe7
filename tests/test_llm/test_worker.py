"""Workers of language models: in this process and in a pool they are the same to whoever trains."""

import numpy as np
import pytest
import torch
from tiny_models import write_llama

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.core.records import UpdateRecord
from eggroll.distributed import LocalPool
from eggroll.errors import DataError, RunError
from eggroll.llm.backends.build import WorkerFactory

PROMPTS = ["What is red?", "Name a fish.", "Say hi.", "Count to three.", "Who?"]
CONFIG = EggrollConfig(
    population_size=8, rank=1, sigma=0.05, lr=0.05, generations=3, max_tokens=6, prompts_per_generation=2, eval_every=0
)


def checksum(text):
    return float(sum(position * ord(character) for position, character in enumerate(text, start=1)) % 1009)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(write_llama(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def local(monkeypatch):
    """The pool's workers are in this process."""
    monkeypatch.setattr("eggroll.llm.backends.pool.RayPool", LocalPool)


def settings(tiny):
    return {"model": tiny, "config": CONFIG, "reward": checksum, "dtype": "float32", "device": "cpu"}


def make(tiny, **options):
    return EggrollTrainer.from_model_id(**settings(tiny), **options)


def same(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_range_has_the_same_scores_whenever_it_is_asked_for(tiny):
    worker = WorkerFactory(**settings(tiny))()
    worker.use(PROMPTS)
    whole = worker.evaluate(1, 0.05, range(8)).fitness
    parts = [worker.evaluate(1, 0.05, part).fitness for part in (range(6, 8), range(2, 6), range(2))]
    np.testing.assert_array_equal(np.concatenate(parts[::-1]), whole)
    assert worker.setup.name == "tiny"
    assert worker.setup.dtype_name == "float32"


def test_a_state_is_all_that_an_update_depends_on(tiny):
    first, second = (WorkerFactory(**settings(tiny))() for _ in range(2))
    records = [UpdateRecord.make(g, 0.05, 0.05, np.linspace(-0.5, 0.5, 8)) for g in range(3)]
    first.apply(records[0])
    second.load_state_tensors({name: value.clone() for name, value in first.state_tensors().items()})
    for record in records[1:]:
        assert first.apply(record) == second.apply(record)
    assert same(first.state_tensors(), second.state_tensors())


@pytest.mark.parametrize("workers", [1, 3])
def test_a_pool_learns_what_one_worker_learns(tiny, local, tmp_path, workers):
    """Ranges of members are those of any number of workers, so they are compared with one worker's ranges."""
    with make(tiny, workers=workers) as pool, make(tiny, workers=1) as one:
        histories = [trainer.evolve(PROMPTS, eval_data=["Why?"]) for trainer in (pool, one)]
        mine, theirs = ([line["fitness_mean"] for line in history] for history in histories)
        assert mine == theirs
        assert same(pool.worker.state_tensors(), one.worker.state_tensors())
        assert pool.worker.setup.place == f"{workers} worker{'s' if workers > 1 else ''}"
        saved = dict(pool.worker.model().named_parameters())
        state = pool.worker.state_tensors()
        assert all(saved[spec.name].equal(state[f"parameter/{spec.name}"]) for spec in pool.evolved)


def test_what_is_learned_moves_to_new_workers(tiny, local, tmp_path):
    with make(tiny, workers=1) as trainer:
        trainer.evolve(PROMPTS, callback=lambda metrics: metrics["generation"] < 2)
        before = {name: value.clone() for name, value in trainer.worker.state_tensors().items()}
        trainer.save_checkpoint(tmp_path / "checkpoint")
        trainer.worker.use(["Other?", "Prompts?"])
        assert same(trainer.worker.state_tensors(), before)
    with make(tiny, workers=2) as trainer:
        with pytest.raises(RunError, match="there are no workers: none were started"):
            trainer.worker.state_tensors()
        assert trainer.load_checkpoint(tmp_path / "checkpoint") == 2
        trainer.worker.use(PROMPTS)
        assert same(trainer.worker.state_tensors(), before)
        assert len(trainer.evolve(PROMPTS)) == 1


def test_workers_take_no_tokenized_batches(tiny):
    with make(tiny, workers=1) as trainer, pytest.raises(DataError, match="not tokenized batches"):
        trainer.evolve([{"input_ids": torch.zeros(1, 4, dtype=torch.long)}])
