"""What prompts have in common at their beginning."""

import pytest
import torch

from eggroll.llm.generation.prefix import MIN_PREFIX, common_prefix


def padded(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


LONG = list(range(1, MIN_PREFIX + 5))


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([[*LONG, 91], [*LONG, 92, 93]], len(LONG)),
        ([[*LONG, 91, 50], [*LONG, 92, 50], [*LONG[:-1], 0, 0, 50]], len(LONG) - 1),  # 0 is a token here, not padding
        ([LONG, [*LONG, 92, 93]], len(LONG) - 1),  # the shortest keeps a token of its own
        ([LONG, LONG], len(LONG) - 1),
        ([[*LONG[:5], 91], [*LONG[:5], 92]], 0),  # too short to be worth it
        ([[*LONG, 91]], 0),  # alone
        ([[7, *LONG], [8, *LONG]], 0),
    ],
)
def test_common_prefix(rows, length):
    assert common_prefix(*padded(rows)) == length
