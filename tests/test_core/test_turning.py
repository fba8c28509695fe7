"""The cosine of successive updates from a sample of their entries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eggroll.core.turning import ENTRIES, Turning, stride_of


def cosine(one, other):
    return float(np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other))


def taken(turning, change):
    for name, value in change.items():
        stride = stride_of(value.shape)
        turning.add(name, value.reshape(-1)[::stride], stride)
    turning.finish()
    return turning.cosine


def test_of_small_parameters_it_is_exact():
    rng = np.random.default_rng(0)
    first, second = ({"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(5)} for _ in range(2))
    turning = Turning()
    assert taken(turning, first) is None
    flat = [np.concatenate([change["a"].ravel(), change["b"]]) for change in (first, second)]
    assert taken(turning, second) == pytest.approx(cosine(*flat), abs=1e-6)


def test_of_large_ones_it_is_an_estimate():
    """Parameters of different sizes count as much as they are large."""
    rng = np.random.default_rng(1)
    common = {"large": rng.standard_normal((300, 400)), "small": 5.0 * rng.standard_normal((40, 60))}
    first = {name: value + rng.standard_normal(value.shape) for name, value in common.items()}
    second = {name: value + rng.standard_normal(value.shape) for name, value in common.items()}
    turning = Turning()
    taken(turning, first)
    flat = [np.concatenate([change[name].ravel() for name in common]) for change in (first, second)]
    assert taken(turning, second) == pytest.approx(cosine(*flat), abs=0.02)


@pytest.mark.parametrize("shape", [(), (7,), (64, 64), (576, 1536), (49152, 576), (128, 128, 3, 3), (1, 10**6)])
def test_the_sample_is_of_all_columns_and_not_too_large(shape):
    stride, size = stride_of(shape), math.prod(shape)
    assert -(-size // stride) <= ENTRIES
    row = shape[-1] if shape else 1
    assert stride == 1 or math.gcd(stride, row) == 1
    assert len({place % row for place in range(0, size, stride)}) == min(row, -(-size // stride))


def test_updates_that_change_nothing_have_no_angle():
    turning = Turning()
    taken(turning, {"a": np.ones(3)})
    assert taken(turning, {"a": np.zeros(3)}) is None
    assert taken(turning, {"a": np.ones(3)}) is None
    assert taken(turning, {"a": -np.ones(3)}) == pytest.approx(-1.0)


def test_it_forgets():
    turning = Turning()
    taken(turning, {"a": np.ones(3)})
    turning.forget()
    assert taken(turning, {"a": np.ones(3)}) is None
    assert taken(turning, {"a": np.ones(3)}) == pytest.approx(1.0)
