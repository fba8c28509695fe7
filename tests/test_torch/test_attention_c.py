"""Attention of one position in C: against float64, whatever the shapes, strides and masks; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eggroll.torch.kernels import attention_c

pytestmark = pytest.mark.skipif(attention_c.why_not() is not None, reason=f"no C: {attention_c.why_not()}")

SHAPES = [  # rows, heads, heads of keys, length, head size, size of values
    (3, 9, 3, 70, 64, 64),
    (2, 4, 4, 1, 16, 16),
    (2, 8, 1, 64, 32, 48),
    (1, 6, 2, 129, 128, 128),
    (2, 4, 1, 200, 256, 256),
    (2, 10, 2, 33, 80, 96),
]


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same in float64, written out: ``(R, 1, H, v)``."""
    share = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = (q * k).sum(-1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], -torch.inf)
    return (torch.softmax(scores, -1).unsqueeze(-1) * v).sum(2).unsqueeze(1)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, groups, length, size, width = shape
    make = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(rows, heads, 1, size, generator=make)
    k, v = (torch.randn(rows, groups, length, each, generator=make) for each in (size, width))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def bound(dtype: torch.dtype) -> dict[str, float]:
    """float32: sums of up to 256 numbers of size 1; bfloat16: one rounding of the result on top."""
    return {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2.0**-8, "atol": 2e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_oracle(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    q, k, v = inputs(shape, dtype)
    mask = None
    if masked:
        mask = torch.rand(shape[0], 1, 1, shape[3], generator=torch.Generator().manual_seed(1)) > 0.4
        mask[..., -1] = True
    scale = shape[4] ** -0.5
    found = attention_c.attend(q, k, v, mask, scale)
    assert found is not None
    assert (found.dtype, found.shape) == (dtype, (shape[0], 1, shape[1], shape[5]))
    torch.testing.assert_close(found.double(), oracle(q, k, v, mask, scale), **bound(dtype))


def test_strides_and_threads_change_nothing() -> None:
    """A cache with free columns, queries cut out of a product, and one thread or two: the same bits."""
    q, k, v = inputs((40, 9, 3, 100, 64, 64), torch.float32)
    dense = attention_c.attend(q, k, v, None, 0.125)
    room = torch.full((2, 40, 3, 130, 64), torch.nan)
    room[0, :, :, :100], room[1, :, :, :100] = k, v
    wide = q.transpose(1, 2).reshape(40, 1, -1).repeat(1, 1, 2)[..., : 9 * 64].view(40, 1, 9, 64).transpose(1, 2)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found = attention_c.attend(wide, room[0, :, :, :100], room[1, :, :, :100], None, 0.125)
            assert torch.equal(found, dense)
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_its_neighbors() -> None:
    q, k, v = inputs((8, 6, 2, 90, 64, 64), torch.bfloat16)
    mask = torch.ones(8, 1, 1, 90, dtype=torch.bool)
    mask[:, :, :, :20] = torch.arange(8).view(8, 1, 1, 1) % 2 == 0
    together = attention_c.attend(q, k, v, mask, 0.125)
    for row in range(8):
        one = slice(row, row + 1)
        assert torch.equal(attention_c.attend(q[one], k[one], v[one], mask[one], 0.125), together[one])


def test_hidden_columns_are_not_read() -> None:
    """What stands in the padding, even NaN, does not matter; a row that sees nothing gets zeros."""
    q, k, v = inputs((3, 4, 2, 150, 32, 32), torch.float32)
    mask = torch.ones(3, 1, 1, 150, dtype=torch.bool)
    mask[0, ..., :100], mask[1, ..., 140:], mask[2] = False, False, False
    expected = oracle(q[:2], k[:2], v[:2], mask[:2], 0.2)
    k[0, :, :100], v[1, :, 140:], k[2] = torch.nan, torch.nan, torch.nan
    found = attention_c.attend(q, k, v, mask, 0.2)
    torch.testing.assert_close(found[:2].double(), expected, **bound(torch.float32))
    assert torch.equal(found[2], torch.zeros_like(found[2]))


def test_large_scores() -> None:
    """Scores far apart: the largest alone counts, and nothing overflows."""
    q, k, v = inputs((2, 4, 4, 80, 64, 64), torch.float32)
    found = attention_c.attend(q, k, v, None, 100.0)
    torch.testing.assert_close(found.double(), oracle(q, k, v, None, 100.0), rtol=1e-3, atol=1e-3)
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "case", ["two queries", "head size", "float mask", "heads", "mixed dtypes", "float64", "gradient", "vmap", "empty"]
)
def test_refused(case: str) -> None:
    """What the library is not made for goes another way."""
    q, k, v = inputs((2, 4, 2, 8, 32, 32), torch.float32)
    mask = None
    if case == "two queries":
        q = q.repeat(1, 1, 2, 1)
    elif case == "head size":
        q, k = q[..., :24], k[..., :24]
    elif case == "float mask":
        mask = torch.zeros(2, 1, 1, 8)
    elif case == "heads":
        q = q[:, :3]
    elif case == "mixed dtypes":
        k = k.bfloat16()
    elif case == "float64":
        q, k, v = q.double(), k.double(), v.double()
    elif case == "gradient":
        q = q.requires_grad_()
    elif case == "empty":
        k, v = k[:, :, :0], v[:, :, :0]
    if case == "vmap":
        seen = []
        torch.func.vmap(lambda x: (seen.append(attention_c.attend(x, k, v, None, 0.2)), x)[1])(q.unsqueeze(0))
        assert seen == [None]
    else:
        with torch.enable_grad():
            assert attention_c.attend(q, k, v, mask, 0.2) is None
