"""From several samples of a prompt to one score: their mean, or the expected best of k (pass@k); and unscored ones."""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray


def reduce_samples(scores: NDArray[np.float64], pass_at: int = 0) -> NDArray[np.float64]:
    """One score per member and prompt.

    Args:
        scores: ``(members, prompts, n)``, one per sample; NaN is a sample without a score.
        pass_at: 0 takes the mean over the samples that have a score; ``k`` the expected best of ``k`` samples drawn
            without replacement from the ``n``: for scores of 0 and 1 the unbiased estimate of pass@k (Chen et al.
            2021, equation 1). A sample without a score counts as the worst there is.

    Returns:
        ``(members, prompts)``; NaN where no sample has a score.
    """
    count = scores.shape[-1]
    if count == 1:
        return scores[..., 0]
    valid = ~np.isnan(scores)
    if pass_at == 0:
        total = np.where(valid, scores, 0.0).sum(axis=-1)
        held = valid.sum(axis=-1)
        return np.where(held > 0, total / np.maximum(held, 1), np.nan)
    # The i-th smallest of n is the best of k in C(i, k - 1) of the C(n, k) choices.
    weights = np.array([comb(i, pass_at - 1) for i in range(count)], dtype=np.float64) / comb(count, pass_at)
    worst = np.where(valid, scores, np.inf).min(axis=-1, keepdims=True)
    filled = np.sort(np.where(valid, scores, worst), axis=-1)
    return np.where(valid.any(axis=-1), np.nan_to_num(filled, posinf=0.0) @ weights, np.nan)


def fill_unscored(scores: NDArray[np.float64], unscored: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores in which each unscored one is the mean of all scored ones of its prompt, over members and samples.

    An answer that nobody judged then weighs about nothing in the estimate, whatever the shaping. NaN that are scores
    (the worst there are) stay, and count in no mean.

    Args:
        scores: ``(members, prompts, n)``, one per sample.
        unscored: which of them stand for nothing, in the same shape.

    Returns:
        In the same shape. A prompt without any score gets the mean of all prompts, the same for each member.
    """
    if not unscored.any():
        return scores
    held = ~unscored & np.isfinite(scores)
    overall = scores[held].mean() if held.any() else np.nan
    counts = held.sum(axis=(0, 2))
    sums = np.where(held, scores, 0.0).sum(axis=(0, 2))
    means = np.where(counts > 0, sums / np.maximum(counts, 1), overall)
    return np.where(unscored, means[None, :, None], scores)
