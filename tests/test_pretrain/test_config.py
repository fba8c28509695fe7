"""Settings: what cannot work, what a resumed run may change, what the loop is told."""

import numpy as np
import pytest

from eggroll.core.settings import may_change
from eggroll.errors import ConfigError
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.update import shape_pairs


def test_all_problems_of_the_settings_at_once():
    with pytest.raises(ConfigError) as error:
        PretrainOptions(population_size=7, group_size=3, alpha=1.5, sigma_shift=13, noise_table_size=100, minutes=-1,
                        alpha_final=1e-12, threads=0, members_per_forward=-2, backend="c", device="cuda")  # fmt: skip
    message = str(error.value)
    for part in (
        "population_size (=7) must be even: members come in pairs; use 8",
        "group_size (=3) must be even and divide population_size (=7)",
        "alpha (=1.5) is a share of the weights; it must be at most 1",
        "sigma_shift (=13) must be at most 12",
        "noise_table_size (=100) is smaller than the largest draw",
        "minutes (=-1) must be above 0",
        "alpha_final (=1e-12) must be at least 1e-09",
        "threads (=0) must be at least 1",
        "members_per_forward (=-2) must be at least 1",
        "backend='c' runs on the CPU, not on device='cuda'; use backend='torch'",
    ):
        assert part in message
    with pytest.raises(ConfigError, match=r"precision \(='fp32'\) has Adam .*: alpha, momentum_shift would do nothing"):
        PretrainOptions(precision="fp32", alpha=0.5, momentum_shift=2)
    with pytest.raises(ConfigError, match=r"hidden .* must be 1 to 16384"):
        PretrainOptions(hidden=20000)
    with pytest.raises(ConfigError, match=r"rank .* must be a whole number of at least 1"):
        PretrainOptions(rank=0)


def test_a_resumed_run_may_change_what_changes_no_weight():
    free = may_change(PretrainOptions())
    assert free == {
        "generations", "minutes", "resume", "report_to", "backend", "device", "threads",
        "members_per_forward", "eval_every", "eval_tokens", "sample_every", "sample_length", "prompt",
        "workers", "ray_address", "worker_cpus", "worker_gpus", "accept_changes", "patience",
    }  # fmt: skip
    assert free - may_change(PretrainOptions(alpha_schedule="exponential")) == {"generations"}
    held = {"generations", "device", "members_per_forward"}
    assert free - may_change(PretrainOptions(precision="fp32")) == held


@pytest.mark.parametrize("fitness", ["sign", "normalized"])
@pytest.mark.parametrize("tokens", [1, 7, 16, 100])
def test_pairs_are_shaped_from_the_whole_numbers_behind_the_scores(fitness, tokens):
    config = PretrainOptions(fitness=fitness, tokens=tokens, population_size=2000).es()
    scores = np.random.default_rng(tokens).integers(-128 * tokens, 1, 2000).astype(np.int32)
    scores[:200] = scores[200:400]
    scores[:100:2] = scores[1:100:2]
    weights = config.shape(scores / (16 * tokens))
    assert weights.dtype == np.float32
    assert np.array_equal(16 * weights, shape_pairs(scores, fitness))
    assert config.weight_metrics(weights) == {"ties": float((weights == 0).mean())}
    with pytest.raises(AssertionError, match="whole sixteenths"):
        config.shape(np.full(2000, 0.0123))
