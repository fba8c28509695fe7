"""Every row of docs/scale-conventions.md: the other code's update, written as it states it, is ours at the given lr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eggroll.core import oracle
from eggroll.core.address import factor_draw
from eggroll.core.fitness import shape_fitness
from eggroll.core.select import ParameterSpec

PAGE = Path(__file__).parents[2] / "docs" / "scale-conventions.md"
SPEC = ParameterSpec("w", (7, 5), "matrix")
SIGMA, LR, RANK, SEED, POPULATION = 0.02, 0.3, 2, 5, 12
SHAPED = np.linspace(-1.0, 1.4, POPULATION) ** 3


def noise(member):
    """``E_p``, unit variance per entry."""
    return oracle.perturbation(SPEC, member, rank=RANK, seed=SEED, generation=0)


def eggroll_step(lr):
    return lr * oracle.es_gradient(SPEC, SHAPED, rank=RANK, seed=SEED, generation=0)


def paper():
    return LR / POPULATION * sum(s * noise(p) for p, s in enumerate(SHAPED))


def hyperscale_es():
    # The factor A carries sigma / sqrt(r); the mean over members times sqrt(N) goes to the optimizer.
    total = np.zeros(SPEC.shape)
    for member, s in enumerate(SHAPED):
        a, b = factor_draw(SPEC, RANK, SEED, 0, member // 2)
        sigma = SIGMA if member % 2 == 0 else -SIGMA
        total += s * (a * (sigma / RANK**0.5)).astype(np.float64) @ b.astype(np.float64).T
    return LR * POPULATION**0.5 * (total / POPULATION)


def functional():
    # Members in halves of opposite sign: members 2 k are its first half, 2 k + 1 its second.
    torch = pytest.importorskip("torch")
    f = pytest.importorskip("eggroll.torch.functional")
    key = f.NoiseKey(SEED)
    perts = f.generate_perturbations({"w": SPEC.matrix_shape}, POPULATION, RANK, SIGMA, key, torch.float64)
    halves = torch.from_numpy(np.concatenate([SHAPED[0::2], SHAPED[1::2]]))
    return LR * f.compute_gradients(halves, perts, POPULATION)["w"].numpy()


def eggroll_vllm():
    # Differences over pairs; the adapters carry sqrt(sigma) and sqrt(sigma / r).
    total = np.zeros(SPEC.shape)
    for pair in range(POPULATION // 2):
        a, b = (factor.astype(np.float64) for factor in factor_draw(SPEC, RANK, SEED, 0, pair))
        difference = SHAPED[2 * pair] - SHAPED[2 * pair + 1]
        total += difference * (a * (SIGMA / RANK) ** 0.5) @ (b * SIGMA**0.5).T
    return LR / (POPULATION * SIGMA) * total


def eggroll_vllm_scaled():
    return eggroll_vllm() * POPULATION**0.5


def openai_es():
    return LR / (POPULATION * SIGMA) * sum(s * noise(p) for p, s in enumerate(SHAPED))


ROWS = {
    "The paper": (paper, LR, "`α`"),
    "ES at Scale": (paper, LR, "`α`"),
    "HyperscaleES, SGD": (hyperscale_es, LR * SIGMA * POPULATION**0.5, "`lr · σ · √N`"),
    "`eggroll.torch.functional`": (functional, LR * SIGMA * POPULATION**0.5, "`lr · σ · √N`"),
    "eggroll-vllm": (eggroll_vllm, LR, "`lr`"),
    "eggroll-vllm, `--scale-lr-in-grad`": (eggroll_vllm_scaled, LR * POPULATION**0.5, "`lr · √N`"),
    "OpenAI-ES": (openai_es, LR / SIGMA, "`α / σ`"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    theirs, our_lr, _ = ROWS[name]
    np.testing.assert_allclose(eggroll_step(our_lr), theirs(), rtol=1e-6)


def test_the_page_has_exactly_these_rows():
    lines = PAGE.read_text(encoding="utf-8").split("## Conversion table")[1].split("##")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {row[0]: row[2] for row in cells[2:]}
    assert rows == {"eggroll": "`lr`"} | {name: formula for name, (_, _, formula) in ROWS.items()}


def test_both_factors_scaled_by_sigma():
    """``(sigma A)(sigma B)^T`` without 1/sqrt(r): its entries have the standard deviation sigma^2 sqrt(r)."""
    a, b = (factor.astype(np.float64) for factor in factor_draw(SPEC, RANK, SEED, 0, 0))
    np.testing.assert_allclose((SIGMA * a) @ (SIGMA * b).T, SIGMA**2 * RANK**0.5 * noise(0), rtol=1e-9)


def test_shaped_fitness_spreads():
    """Ranks of distinct scores have the standard deviation 1/sqrt(12), z-scores 1: sqrt(12) between them."""
    fitness = np.random.default_rng(0).normal(size=2000)
    assert shape_fitness(fitness, method="centered_rank").std() == pytest.approx(12**-0.5, rel=2e-3)
    assert shape_fitness(fitness, method="normalized").std() == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize(
    ("mirrored", "expected"), [(True, (2 / POPULATION) ** 0.5), (False, (1 / POPULATION) ** 0.5)], ids=["odd", "even"]
)
def test_size_of_a_step(mirrored, expected):
    """Entry rms of es_gradient for z-scores: sqrt(2/N) where pairs score opposite, sqrt(1/N) where unrelated.

    Mean over 200 generations of 35 entries; the rms of one generation varies by a few tenths, so 5 % is over 2 sigma.
    """
    spread = np.random.default_rng(1)
    squares = []
    for generation in range(200):
        scores = spread.normal(size=POPULATION)
        if mirrored:
            scores[1::2] = -scores[0::2]
        scores = (scores - scores.mean()) / scores.std()
        estimate = oracle.es_gradient(SPEC, scores, rank=RANK, seed=SEED, generation=generation)
        squares.append(np.mean(estimate**2))
    assert np.mean(squares) ** 0.5 == pytest.approx(expected, rel=0.06)
