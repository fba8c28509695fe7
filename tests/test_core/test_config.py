"""Settings: what cannot work is refused, all of it at once, in words that help."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eggroll.core.config import ESConfig
from eggroll.errors import ConfigError


def problem(**settings):
    """The message for settings with one problem, without the class's name in front."""
    with pytest.raises(ConfigError) as caught:
        ESConfig(**settings)
    what, _, message = str(caught.value).partition(": ")
    assert what == "ESConfig", f"more than one problem: {caught.value}"
    return message


def test_the_documented_defaults():
    config = ESConfig()
    assert (config.population_size, config.rank, config.sigma, config.lr) == (256, 8, 0.01, 0.001)
    assert (config.generations, config.antithetic, config.fitness_shaping) == (100, True, "centered_rank")
    assert (config.target_modules, config.elite_k, config.weight_decay, config.seed) == (None, 0, 0.0, 42)


def test_settings_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ESConfig().sigma = 1.0


def test_an_odd_population_has_no_pairs():
    expected = "population_size (=7) must be even when antithetic=True; use 8 or antithetic=False"
    assert problem(population_size=7) == expected
    assert ESConfig(population_size=7, antithetic=False).population_size == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population_size": 0}, "population_size (=0) must be a whole number of at least 1"),
        ({"population_size": 8.0}, "population_size (=8.0) must be a whole number of at least 1"),
        ({"population_size": True}, "population_size (=True) must be a whole number of at least 1"),
        ({"rank": 0}, "rank (=0) must be a whole number of at least 1"),
        ({"generations": -1}, "generations (=-1) must be a whole number of at least 0"),
        ({"noise_reuse": 0}, "noise_reuse (=0) must be a whole number of at least 1"),
        ({"seed": -3}, "seed (=-3) must be a whole number of at least 0"),
        ({"seed": 2**64}, f"seed (={2**64}) must be below 2**64"),
        ({"sigma": 0.0}, "sigma (=0.0) must be above 0"),
        ({"sigma": float("nan")}, "sigma (=nan) must be above 0"),
        ({"sigma": "0.1"}, "sigma (='0.1') must be above 0"),
        ({"lr": -0.1}, "lr (=-0.1) must be at least 0"),
        ({"lr": float("inf")}, "lr (=inf) must be at least 0"),
        ({"weight_decay": -1}, "weight_decay (=-1) must be at least 0"),
        ({"lr_decay": 0}, "lr_decay (=0) must be above 0"),
        ({"momentum": 1.0}, "momentum (=1.0) must be a number of at least 0 and below 1"),
        ({"betas": (0.9, 1.0)}, "betas (=(0.9, 1.0)) must be two numbers of at least 0 and below 1"),
        ({"betas": (0.9,)}, "betas (=(0.9,)) must be two numbers of at least 0 and below 1"),
        (
            {"fitness_shaping": "center_rank"},
            "fitness_shaping (='center_rank') must be one of: centered_rank, normalized, raw; "
            "did you mean 'centered_rank'?",
        ),
        ({"optimizer": "lion"}, "optimizer (='lion') must be one of: sgd, momentum, adam, adamw"),
        (
            {"lr_schedule": "cosin"},
            "lr_schedule (='cosin') must be one of: constant, exponential, linear, cosine; did you mean 'cosine'?",
        ),
        (
            {"population_size": 12, "group_size": 5},
            "group_size (=5) must divide population_size (=12); for example [3, 4, 6]",
        ),
        (
            {"group_size": 1},
            "group_size (=1) centers every member on itself; use 0 (the whole population) or at least 2",
        ),
        (
            {"population_size": 8, "elite_k": 8},
            "elite_k (=8) must be below population_size (=8); use 0 for all members",
        ),
        (
            {"population_size": 1, "antithetic": False},
            "population_size (=1) must be at least 2: a single score has no baseline",
        ),
        ({"target_modules": ()}, "target_modules is empty, so nothing would be evolved; use None for all matrices"),
        ({"target_modules": "q_proj"}, "target_modules (='q_proj') must be a list of name patterns; use ['q_proj']"),
        ({"exclude": "lm_head"}, "exclude (='lm_head') must be a list of name patterns; use ['lm_head']"),
        ({"exclude": [""]}, "exclude (=('',)) must be a list of name patterns, none of them empty"),
        ({"exclude": 3}, "exclude (=3) must be a list of name patterns, none of them empty"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_texts(settings, message):
    assert problem(**settings) == message


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        ESConfig(population_size=7, sigma=-1.0, rank=0, fitness_shaping="ranks", seed=2**64)
    lines = str(caught.value).splitlines()
    assert lines[0] == "ESConfig has 5 problems:"
    assert [line.split(" (=")[0] for line in lines[1:]] == [
        "  - fitness_shaping",
        "  - rank",
        "  - sigma",
        "  - population_size",
        "  - seed",
    ]


def test_a_wrong_type_does_not_hide_the_rest():
    with pytest.raises(ConfigError, match=r"(?s)has 2 problems.*population_size \(='many'\).*lr \(=None\)"):
        ESConfig(population_size="many", lr=None)


def test_a_subclass_is_named_in_its_errors():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MyConfig(ESConfig):
        batch: int = 4

        def problems(self):
            return [*super().problems(), *([f"batch (={self.batch}) is too large"] if self.batch > 8 else [])]

    with pytest.raises(ConfigError, match=r"^MyConfig has 2 problems:\n  - rank .*\n  - batch \(=9\) is too large$"):
        MyConfig(batch=9, rank=0)
    assert MyConfig.from_dict(MyConfig(batch=5).to_dict()) == MyConfig(batch=5)


@pytest.mark.parametrize(
    ("settings", "sampling", "antithetic"),
    [
        ({}, "antithetic", True),
        ({"antithetic": False}, "one_sided", False),
        ({"sampling": "one_sided"}, "one_sided", False),
        ({"sampling": "antithetic", "antithetic": False}, "antithetic", True),
    ],
)
def test_sampling_and_antithetic_agree(settings, sampling, antithetic):
    config = ESConfig(**settings)
    assert (config.sampling, config.antithetic) == (sampling, antithetic)


def test_lists_become_tuples():
    config = ESConfig(target_modules=["q_proj", "v_proj"], exclude=["lm_head"], betas=[0.8, 0.9])
    assert (config.target_modules, config.exclude, config.betas) == (("q_proj", "v_proj"), ("lm_head",), (0.8, 0.9))


@given(
    population=st.integers(1, 500).map(lambda half: 2 * half),
    sigma=st.floats(1e-6, 1.0),
    modules=st.none() | st.lists(st.sampled_from(["q_proj", "*.mlp.*", "layers.0"]), min_size=1),
    sampling=st.sampled_from([None, "antithetic", "one_sided"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_settings_survive_json(population, sigma, modules, sampling, seed):
    config = ESConfig(
        population_size=population, sigma=sigma, target_modules=modules, sampling=sampling, seed=seed, betas=(0.5, 0.6)
    )
    assert ESConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_settings_are_errors_with_near_matches():
    with pytest.raises(ConfigError) as caught:
        ESConfig.from_dict({"popluation_size": 8, "learning_rate": 0.1, "zzz": 1, "sigma": 0.1})
    assert str(caught.value).splitlines() == [
        "ESConfig has 3 problems:",
        "  - unknown setting 'popluation_size'; did you mean population_size?",
        "  - unknown setting 'learning_rate'",
        "  - unknown setting 'zzz'",
    ]


def test_one_unknown_setting_is_one_sentence():
    with pytest.raises(
        ConfigError, match=r"^ESConfig: unknown setting 'sigmas'; did you mean sigma or sigma_schedule\?$"
    ):
        ESConfig.from_dict({"sigmas": 0.1})
