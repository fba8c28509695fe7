"""How much of a generation's scores is signal: what differs between members, against the noise between prompts.

The scores ``f`` of members on ``Q`` prompts are split as in an analysis of variance of rows (what was perturbed) by
columns (prompts): a row's true score, with variance ``spread^2`` over rows, and what is left of each single score, with
variance ``noise^2``: the prompt's own answer to the change, and the chance of sampling. For antithetic pairs the rows
are ``(f_2k - f_2k+1) / sqrt(2)``: only the difference of a pair enters an estimate. It has mean 0 over pairs, since
which of the two is called positive is a coin toss; so no mean is estimated::

    between = Q sum_k mean_q(d_kq)^2,                 K degrees of freedom,        expected  noise^2 + Q spread^2
    within  = sum_kq (d_kq - mean_q d_kq)^2,          K (Q - 1),                   expected  noise^2

With one-sided sampling the rows are members less the mean of each prompt, with ``N - 1`` and ``(N - 1)(Q - 1)``.

``1 - within/between`` (mean squares) is the mean over all ways to cut the prompts into halves of the split-half
reliability of rows' mean scores (Cronbach 1951): the share of their variance that another set of prompts would show,
too. It is 0 on average where there is only noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Components:
    """Sums of squares, which add up over generations with the same number of prompts.

    Attributes:
        between, within: sums of squares between rows, and within them.
        rows, cells: their degrees of freedom.
        prompts: ``Q``.
    """

    between: float
    within: float
    rows: int
    cells: int
    prompts: int

    @classmethod
    def of(cls, fitness: NDArray[np.floating[Any]], *, antithetic: bool, least: int = 2) -> Self | None:
        """From ``(N, Q)`` raw scores; rows with a score that is no number are left out.

        Args:
            fitness: the scores.
            antithetic: whether members ``2k`` and ``2k + 1`` are a pair.
            least: rows that there must be; one is enough for pairs.

        Returns:
            ``None`` with fewer than two prompts or ``least`` rows, or if all of them score the same: then there is
            nothing to tell apart.
        """
        table = np.asarray(fitness, np.float64)
        if table.ndim != 2 or table.shape[1] < 2 or (antithetic and len(table) % 2):
            return None
        with np.errstate(invalid="ignore"):
            rows = (table[0::2] - table[1::2]) / math.sqrt(2) if antithetic else table
        rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows) < least:
            return None
        if not antithetic:
            rows = rows - rows.mean(axis=0)
        count = len(rows) if antithetic else len(rows) - 1
        prompts = rows.shape[1]
        means = rows.mean(axis=1)
        within = float(np.square(rows - means[:, None]).sum())
        between = float(prompts * np.square(means).sum())
        scale = float(np.abs(rows).max())
        tiny = rows.size * (1e-12 * scale) ** 2  # of a mean's rounding
        if within <= tiny and between <= tiny:
            return None
        return cls(between, within if within > tiny else 0.0, count, count * (prompts - 1), prompts)

    def __add__(self, other: Components) -> Components:
        assert self.prompts == other.prompts, "components of as many prompts add up"
        return Components(
            self.between + other.between, self.within + other.within, self.rows + other.rows, self.cells + other.cells,
            self.prompts,
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """``F``, the mean square between rows over that within: 1 on average where there is only noise."""
        within = self.within / self.cells
        return self.between / self.rows / within if within > 0 else math.inf

    @property
    def reliability(self) -> float:
        """Split-half reliability of rows' mean scores, at most 1; cut off at -1."""
        return max(-1.0, 1.0 - 1.0 / self.ratio) if self.ratio > 0 else -1.0

    @property
    def noise(self) -> float:
        """Standard deviation of one score of one row around the row's true score."""
        return math.sqrt(self.within / self.cells)

    @property
    def spread(self) -> float:
        """Standard deviation of rows' true scores; 0 where the noise explains all of what is seen."""
        return math.sqrt(max(0.0, self.between / self.rows - self.within / self.cells) / self.prompts)

    @property
    def z(self) -> float:
        """How far ``F`` is above what noise alone gives, in standard deviations of a normal distribution.

        Paulson's approximation of the F distribution (1942), good to a few hundredths from 3 degrees of freedom on.
        """
        if math.isinf(self.ratio):
            return math.inf
        one, two, root = 2 / (9 * self.rows), 2 / (9 * self.cells), self.ratio ** (1 / 3)
        return ((1 - two) * root - (1 - one)) / math.sqrt(two * root**2 + one)

    def metrics(self) -> dict[str, float]:
        """What the log says of it."""
        return {"split_half": self.reliability, "member_spread": self.spread, "prompt_noise": self.noise}
