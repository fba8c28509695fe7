"""Schedules of sigma and the learning rate."""

from __future__ import annotations

import pytest

from eggroll.core.config import ESConfig
from eggroll.core.schedules import Schedule


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant", 0.5, generations=4), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
        (Schedule("exponential", 0.8, decay=0.5, generations=4), [0.8, 0.4, 0.2, 0.1, 0.05, 0.025]),
        (Schedule("linear", 1.0, generations=4), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        (Schedule("linear", 1.0, generations=4, final_fraction=0.2), [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        (Schedule("cosine", 2.0, generations=4), [2.0, 1.7071068, 1.0, 0.2928932, 0.0, 0.0]),
        (Schedule("cosine", 1.0, generations=2, final_fraction=0.1), [1.0, 0.55, 0.1, 0.1, 0.1, 0.1]),
        (Schedule("linear", 1.0, generations=0), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
    ids=lambda value: f"{value.name}-{value.final_fraction}" if isinstance(value, Schedule) else "",
)
def test_values(schedule, expected):
    assert [schedule(generation) for generation in range(6)] == pytest.approx(expected, abs=1e-7)


def test_a_config_makes_its_schedules():
    config = ESConfig(lr=0.5, lr_decay=0.9, sigma=0.1, sigma_schedule="cosine", generations=10)
    assert config.lr_at(3) == pytest.approx(0.5 * 0.9**3)
    assert config.sigma_at(0) == pytest.approx(0.1)
    assert config.sigma_at(10) == pytest.approx(0.01), "sigma falls to a tenth, never to nothing"


def test_without_a_decay_nothing_changes():
    config = ESConfig(lr=0.5, sigma=0.1)
    assert {config.lr_at(generation) for generation in (0, 1, 99)} == {0.5}
    assert {config.sigma_at(generation) for generation in (0, 1, 99)} == {0.1}
