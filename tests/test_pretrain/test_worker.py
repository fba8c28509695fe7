"""Workers: scores of any range of members, updates, states, and pools of workers."""

import dataclasses

import numpy as np
import pytest
import torch

from eggroll.core.records import UpdateRecord
from eggroll.distributed import LocalPool
from eggroll.distributed.crew import WorkerWarning
from eggroll.distributed.partition import ranges
from eggroll.errors import RunError
from eggroll.loop import Loop
from eggroll.pretrain import kind
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import window_starts
from eggroll.pretrain.model import oracle

SIGMA = 1 / 16
UNEVEN = [range(0, 2), range(2, 12), range(12, 14), range(14, 60), range(60, 64)]
"""Ranges of 64 members, all of which cut through groups of 8."""


def numpy_state(worker):
    return {name: np.asarray(value).copy() for name, value in worker.state_tensors().items()}


def assert_same_state(first, second):
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def evolved(worker, options, generations=None, start=0):
    """The state after some generations, and the history."""
    config = options.es()
    if generations is not None:
        config = dataclasses.replace(config, generations=generations)
    history = Loop(config, worker, heldout=True, eval_every=2).go(start)
    return numpy_state(worker), history


def test_members_of_a_group_read_the_same_window(options):
    """A population whose groups are the whole of it, scored by the oracle."""
    settings = dataclasses.replace(options, group_size=64, context=4)
    worker = kind.make_worker(settings)
    scores = worker.evaluate(2, SIGMA, range(64)).fitness * (16 * settings.tokens)
    start = int(window_starts(worker.corpus.train, 1, 11, seed=settings.seed, generation=2)[0])
    window = worker.corpus.train[start : start + 11]
    params, noise, shape = worker.engine.params, worker.engine.noise, worker.engine.shape
    _, state = oracle.forward(params, window[:4])
    for member in (0, 7, 63):
        drawn = {p.name: noise.draw(p, 2, [member // 2])[0] for p in shape.parameters}
        draws = oracle.member_draws(shape.parameters, 1, drawn, 1 - 2 * (member % 2))
        shift = oracle.noise_shift(1, 4)
        assert oracle.fitness(params, window[4:], state, draws=draws, shift=shift) == scores[member]


@pytest.mark.parametrize("changes", [{}, {"context": 0}, {"noise": "counter", "rank": 2}], ids=str)
def test_uneven_ranges_add_up_to_the_whole(options, changes):
    worker = kind.make_worker(dataclasses.replace(options, group_size=8, **changes))
    whole = worker.evaluate(3, SIGMA, range(64))
    parts = [worker.evaluate(3, SIGMA, members) for members in UNEVEN]
    assert whole.fitness.dtype == np.float64
    assert np.array_equal(np.concatenate([part.fitness for part in parts]), whole.fitness)
    assert sum(part.tokens for part in parts) == whole.tokens == 64 * options.tokens
    assert np.array_equal(worker.evaluate(3, SIGMA, UNEVEN[1]).fitness, parts[1].fitness)


def test_ranges_of_whole_forward_passes_add_up_in_floating_point(options):
    settings = dataclasses.replace(options, precision="fp32", members_per_forward=16, momentum_shift=0, group_size=8)
    worker = kind.make_worker(settings)
    whole = worker.evaluate(3, SIGMA, range(64)).fitness
    size = kind.range_size(settings)
    assert size == 16
    parts = [worker.evaluate(3, SIGMA, members).fitness for members in ranges(64, size)]
    assert np.array_equal(np.concatenate(parts), whole)
    uneven = np.concatenate([worker.evaluate(3, SIGMA, members).fitness for members in UNEVEN])
    np.testing.assert_allclose(uneven, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("population", "group", "size"), [(16, 2, 2), (48, 4, 4), (600, 600, 600), (262144, 2, 4096), (4096, 6, 258)]
)
def test_ranges_hold_whole_groups(population, group, size):
    population -= population % group
    options = PretrainOptions(population_size=population, group_size=group)
    assert kind.range_size(options) == size


@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_updates_from_a_state_are_those_in_sequence(options, precision):
    settings = dataclasses.replace(options, precision=precision, momentum_shift=2 if precision == "int8" else 0)
    config, first = settings.es(), kind.make_worker(settings)
    states, norms = [numpy_state(first)], []
    records = []
    for generation in range(3):
        weights = config.shape(first.evaluate(generation, SIGMA, range(64)).fitness)
        records.append(UpdateRecord.make(generation, SIGMA, config.lr_at(generation), weights))
        norms.append(first.apply(records[-1]))
        states.append(numpy_state(first))
    assert min(norms) > 0
    for start in range(4):
        # One that has been elsewhere before: nothing of that may stay.
        other = kind.make_worker(settings)
        other.load_state_tensors(first.state_tensors())
        other.load_state_tensors(as_tensors(states[start]))
        assert_same_state(numpy_state(other), states[start])
        for record in records[start:]:
            assert other.apply(record) == norms[record.generation]
        assert_same_state(numpy_state(other), states[3])


def as_tensors(state):
    """As a checkpoint gives them: PyTorch tensors."""
    return {name: torch.from_numpy(value.copy()) for name, value in state.items()}


@pytest.mark.parametrize("changes", [{}, {"group_size": 8, "fitness": "normalized"}, {"precision": "fp32"}], ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(options, changes, workers):
    if changes.get("precision"):
        changes = {**changes, "momentum_shift": 0, "members_per_forward": 16}
    settings = dataclasses.replace(options, generations=4, **changes)
    expected, alone = evolved(kind.make_worker(settings), settings)
    size = kind.range_size(settings)
    with LocalPool(
        lambda: kind.make_worker(settings), workers=workers, population_size=64, range_size=size, check_every=2
    ) as pool:
        found, shared = evolved(pool, settings)
    assert_same_state(found, expected)
    for name in ("fitness_mean", "ties", "validation_bits_per_byte"):
        assert [line.get(name) for line in shared] == [line.get(name) for line in alone]


def test_a_killed_worker_changes_nothing(options):
    settings = dataclasses.replace(options, generations=6)
    expected, _ = evolved(kind.make_worker(settings), settings)
    with LocalPool(lambda: kind.make_worker(settings), workers=2, population_size=64) as pool:
        evolved(pool, settings, generations=3)
        pool.kill(pool.workers()[0]["number"])
        with pytest.warns(WorkerWarning, match="its members are scored by others"):
            found, _ = evolved(pool, settings, start=3)
    assert_same_state(found, expected)


def test_a_checkpoint_of_another_shape_is_refused(options):
    worker = kind.make_worker(options, with_data=False)
    other = kind.make_worker(dataclasses.replace(options, hidden=4), with_data=False)
    with pytest.raises(RunError, match=r"another shape: emb \(256, 4\) instead of \(256, 16\)"):
        worker.load_state_tensors(other.state_tensors())


def test_the_last_validation_reads_everything(options, text_file):
    text_file.write_bytes(b"abcd efgh. " * 4000)
    worker = kind.make_worker(dataclasses.replace(options, eval_tokens=2000, sample_every=4))
    part, whole = worker.heldout(2), worker.heldout(options.generations)
    assert part.metrics["validation_bytes"] < whole.metrics["validation_bytes"] == len(worker.corpus.validation) - 1
    assert whole.reward == -whole.metrics["validation_bits_per_byte"]
    assert part.samples == []
    assert [row["reward"] for row in whole.samples] == [whole.reward]
    assert len(worker.heldout(4).samples) == len(worker.heldout(0).samples) == 1
