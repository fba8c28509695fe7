"""What a model is worth, and what it writes."""

import numpy as np
import pytest

from eggroll.pretrain import measure
from eggroll.pretrain.engines import choose
from eggroll.pretrain.model import oracle
from eggroll.pretrain.model.shape import ModelShape


def test_bits_per_byte_are_those_of_the_logits():
    shape = ModelShape(256, 16, 1)
    made = choose.make_engine(oracle.init_params(shape))
    stream = np.random.default_rng(0).integers(0, 256, 2500).astype(np.uint8)
    found, count = measure.bits_per_byte(made, stream)
    total = 0.0
    for start in (0, 1024, 2048):
        lane = stream[start : start + 1025]
        powers = 2.0 ** (oracle.forward(made.params, lane[:-1])[0].astype(float) / 16)
        total -= np.log2(powers[np.arange(len(powers)), lane[1:]] / powers.sum(axis=1)).sum()
    assert count == 2499
    assert found == pytest.approx(total / 2499, abs=1e-9)
    assert measure.bits_per_byte(made, stream, 1024)[1] == 1024
    assert measure.bits_per_byte(made, stream[:9])[1] == 8


def test_the_unigram_and_the_bigram_baseline():
    train = np.frombuffer(b"ab" * 500, np.uint8)
    found = measure.baseline_bits(train, train[:101])
    assert found["unigram_bits_per_byte"] == pytest.approx(np.log2(1256 / 501))
    assert found["order_1_bits_per_byte"] == pytest.approx(np.log2(756 / 501), abs=0.002)


def test_samples_are_reproducible_and_follow_the_logits(backend):
    made = choose.make_engine(oracle.init_params(ModelShape(256, 16, 1)), backend=backend)
    first = measure.sample(made, b"abc", 20, seed=1)
    assert first == measure.sample(made, b"abc", 20, seed=1)
    assert first != measure.sample(made, b"abc", 20, seed=2)
    greedy = measure.sample(made, b"abc", 4, temperature=0)
    read = np.frombuffer(b"\0abc" + greedy, np.uint8)
    logits, _ = oracle.forward(made.params, read[:-1])
    assert bytes(logits[3:].argmax(axis=1).astype(np.uint8)) == greedy
    counts = np.bincount(
        [measure.sample(made, b"abc", 1, temperature=2, seed=seed)[0] for seed in range(300)], minlength=256
    )
    weights = 2.0 ** (logits[3].astype(float) / 32)
    likely = weights / weights.sum() > 0.02
    assert abs(counts[likely].sum() / 300 - weights[likely].sum() / weights.sum()) < 0.1
