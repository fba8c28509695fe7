"""Blocks of rows: their size comes from the processor, and results do not depend on it beyond rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eggroll.errors import ConfigError
from eggroll.torch import low_rank
from eggroll.torch.kernels import cache


def caches(folder: Path, *sizes: tuple[str, str]) -> Path:
    """The files that Linux has for a core's caches."""
    for index, (kind, size) in enumerate(sizes):
        (folder / f"index{index}").mkdir()
        (folder / f"index{index}" / "type").write_text(kind + "\n")
        (folder / f"index{index}" / "size").write_text(size + "\n")
    return folder


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([("Data", "32K"), ("Instruction", "32K"), ("Unified", "1024K"), ("Unified", "32768K")], 32 * 2**20),
        ([("Data", "48K"), ("Instruction", "64M"), ("Unified", "2M")], 2 * 2**20),
        ([("Unified", "what")], None),
        ([], None),
    ],
)
def test_the_last_level_cache_is_read(tmp_path, sizes, expected):
    assert cache.last_level_cache(caches(tmp_path, *sizes)) == expected


@pytest.mark.parametrize(("there", "expected"), [(32 * 2**20, 16 * 2**20), (2**20, cache.LEAST), (None, cache.UNKNOWN)])
def test_a_block_is_half_of_it(monkeypatch, there, expected):
    monkeypatch.delenv("EGGROLL_BLOCK_MB", raising=False)
    monkeypatch.setattr(cache, "last_level_cache", lambda: there)
    assert cache.block_bytes.__wrapped__() == expected


def test_the_variable_counts_more(monkeypatch):
    monkeypatch.setenv("EGGROLL_BLOCK_MB", "3")
    assert cache.block_bytes.__wrapped__() == 3 * 2**20


@pytest.mark.parametrize("given", ["0", "-1", "4.5", "large"])
def test_nonsense_is_refused(monkeypatch, given):
    monkeypatch.setenv("EGGROLL_BLOCK_MB", given)
    with pytest.raises(ConfigError, match=r"must be a whole number of MiB, at least 1; unset it"):
        cache.block_bytes.__wrapped__()


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_agree_within_rounding(monkeypatch, dtype, rank):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6 * 16, 24, generator=generator), torch.randn(40, 24, generator=generator)
    a, b = torch.randn(6, 40, rank, generator=generator), torch.randn(6, 24, rank, generator=generator)
    exact = (x.double().view(6, 16, 24) @ (w.double() + a.double() @ b.double().mT).mT).view(96, 40)
    for size in (1, 16 * 64 * dtype.itemsize, 2**30):
        monkeypatch.setattr(low_rank, "BLOCK_BYTES", size)
        got = low_rank.linear(x.to(dtype), w.to(dtype), a.to(dtype), b.to(dtype))
        scale = float(exact.abs().max())
        bound = scale * (2e-6 if dtype is torch.float32 else 0.03)  # operands are rounded to 2^-9 of their size
        assert float((got.double() - exact).abs().max()) < bound
