"""Expanded GGUF tensors have the bits that gguf gives them, in C and without."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from tiny_models import gguf_blocks

from eggroll.llm.models.gguf_tensors import numbers_of
from eggroll.torch.kernels import gguf_c

KINDS = [*gguf_c.KINDS, "IQ4_NL", "F32", "F16", "BF16"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[False, True], ids=["C", "no C"])
def compiler(request, monkeypatch):
    if request.param:
        monkeypatch.setenv("EGGROLL_NO_C", "1")
    gguf_c._entry.cache_clear()
    yield
    gguf_c._entry.cache_clear()


def tensor(kind, shape):
    """As gguf's reader has it: read-only."""
    own = gguf.GGMLQuantizationType[kind]
    if kind == "IQ4_NL":  # random codes, scales of about 1
        data = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // 32, 18), dtype=np.uint8)
        data[..., :2] = np.frombuffer(np.float16(0.75).tobytes(), np.uint8)
        data = data.reshape(*shape[:-1], -1)
    else:
        data = gguf_blocks(np.random.default_rng(1).normal(size=shape).astype(np.float32), own)
    data.flags.writeable = False
    return SimpleNamespace(tensor_type=own, data=data, name="blk.0.ffn_up.weight")


@pytest.mark.parametrize("shape", [(7, 512), (3, 5, 256)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_gguf(kind, shape, compiler):
    made = tensor(kind, shape)
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(made.data, made.tensor_type)))
    assert expected.shape == shape
    assert expected.abs().max() > 0
    order = np.random.default_rng(2).permutation(shape[0])
    for dtype in DTYPES:
        assert torch.equal(numbers_of(made, dtype), expected.to(dtype))
        assert torch.equal(numbers_of(made, dtype, order), expected.to(dtype)[order])
    if kind in gguf_c.KINDS:
        found = numbers_of(made, torch.float32).view(torch.int32)
        assert torch.equal(found, expected.view(torch.int32))  # zeros have the same sign


def test_c_knows_the_sizes_of_blocks():
    for kind, (_, weights, size) in gguf_c.KINDS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (weights, size)
    assert len({number for number, _, _ in gguf_c.KINDS.values()}) == len(gguf_c.KINDS)


def test_other_formats_are_not_for_c():
    assert gguf_c.unpack(torch.zeros(2, 18, dtype=torch.uint8), "IQ4_NL", torch.float32) is None
    assert gguf_c.unpack(torch.zeros(2, 18, dtype=torch.uint8), "Q4_0", torch.float16) is None
