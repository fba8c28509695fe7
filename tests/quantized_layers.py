"""Linear layers in every quantized format that can be moved, made by the formats' own libraries from plain ones."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from eggroll._optional import require
from eggroll.torch.quantized.adopt import adopt
from eggroll.torch.quantized.gguf import GgufGrid
from eggroll.torch.quantized.gptq import GptqLinear
from eggroll.torch.quantized.tensor import as_parameter


def torchao(config, linear, dtype):
    quantization = require("torchao.quantization", extra="quantized")
    from torchao.quantization.granularity import PerGroup

    made = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig,
        "int4": lambda: quantization.IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        "int8 groups": lambda: quantization.IntxWeightOnlyConfig(torch.int8, PerGroup(32)),
    }[config]()
    held = nn.Sequential(linear)
    quantization.quantize_(held, made)
    return held[0]


def gguf_blocks(kind, weight):
    gguf = require("gguf", extra="llm")
    blocks = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(blocks.copy())


def gguf(kind, linear, dtype):
    linear._parameters["weight"] = as_parameter(GgufGrid(gguf_blocks(kind, linear.weight), kind, dtype))
    return linear


def bitsandbytes(kind, linear, dtype):
    library = require("bitsandbytes", extra="quantized")
    m, n = linear.weight.shape
    bias = linear.bias is not None
    if kind.startswith("int8"):
        made = library.nn.Linear8bitLt(n, m, bias, has_fp16_weights=False, threshold=2.0 if "outliers" in kind else 0.0)
    else:
        made = library.nn.Linear4bit(n, m, bias, quant_type=kind[:3], compress_statistics="nested" in kind)
    made.load_state_dict(linear.state_dict())
    made = made.to("cpu").eval().requires_grad_(False)
    if bias:
        made.bias.data = made.bias.data.to(dtype)
    return made


def compressed(bits, linear, dtype, *, symmetric=True, groups=True, activations=False):
    library = require("compressed_tensors.quantization", extra="quantized")
    weights = library.QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group" if groups else "channel",
        group_size=32 if groups else None,
    )  # fmt: skip
    inputs = library.QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scheme = library.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs if activations else None
    )
    held = nn.Sequential(linear)
    layout = "int-quantized" if activations else "pack-quantized"
    config = library.QuantizationConfig(config_groups={"all": scheme}, format=layout)
    library.apply_quantization_config(held, config)
    m, n = linear.weight.shape
    grouped = linear.weight.data.view(m, -1, 32 if groups else n)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        linear.weight_scale.data.copy_(grouped.abs().amax(-1) / high)
    else:
        smallest, largest = grouped.amin(-1), grouped.amax(-1)
        scale = (largest - smallest) / (high - low)
        linear.weight_scale.data.copy_(scale)
        linear.weight_zero_point.data.copy_((low - smallest / scale).round().clamp(low, high))
    require("compressed_tensors.compressors", extra="quantized").compress_module(linear)
    return linear.requires_grad_(False)


def gptq(bits, linear, dtype, *, shuffled=False, version=1):
    """Rounded to the nearest level, packed word by word as the format's description says."""
    m, n = linear.weight.shape
    made = GptqLinear(n, m, bits=bits, group_size=32, bias=linear.bias is not None, version=version)
    if shuffled:
        made.g_idx = made.g_idx[torch.randperm(n)]
    groups, top = made.g_idx.long(), 2**bits - 1
    weight = linear.weight.data.float().t()  # (n, m)
    smallest = torch.stack([weight[groups == g].amin(0) for g in range(n // 32)])
    largest = torch.stack([weight[groups == g].amax(0) for g in range(n // 32)])
    scales = ((largest - smallest) / top).half()
    zeros = (-smallest / scales.float()).round().clamp(1, top).int()
    codes = ((weight / scales.float()[groups]).round() + zeros[groups]).clamp(0, top).int()
    made.scales = scales
    made.qweight, made.qzeros = _words(codes, bits), _words((zeros - (2 - version)).t(), bits).t().contiguous()
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return made


def _words(codes, bits):
    """Codes along the first dimension to int32 words, in Python's integers."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0] // per_word, codes.shape[1], dtype=torch.int64)
    for row, values in enumerate(codes.long()):
        words[row // per_word] += values << (bits * (row % per_word))
    return torch.where(words >= 2**31, words - 2**32, words).int()


@dataclass(frozen=True)
class Row:
    """A format: what makes a layer of it, and what its kernel does besides rounding to the activations' dtype."""

    make: Callable
    adopts: bool = True
    exact: bool = True


ROWS = {
    "torchao int8": Row(functools.partial(torchao, "int8")),
    "torchao int4": Row(functools.partial(torchao, "int4")),
    "torchao int8 groups": Row(functools.partial(torchao, "int8 groups")),
    "torchao int8 activations": Row(functools.partial(torchao, "int8 activations"), exact=False),
    "GGUF Q8_0": Row(functools.partial(gguf, "Q8_0"), adopts=False),
    "GGUF Q4_0": Row(functools.partial(gguf, "Q4_0"), adopts=False),
    "GGUF Q4_1": Row(functools.partial(gguf, "Q4_1"), adopts=False),
    "bitsandbytes int8": Row(functools.partial(bitsandbytes, "int8"), exact=False),
    "bitsandbytes int8 outliers": Row(functools.partial(bitsandbytes, "int8 outliers"), exact=False),
    "bitsandbytes nf4": Row(functools.partial(bitsandbytes, "nf4")),
    "bitsandbytes nf4 nested": Row(functools.partial(bitsandbytes, "nf4 nested")),
    "bitsandbytes fp4": Row(functools.partial(bitsandbytes, "fp4")),
    "compressed-tensors int4": Row(functools.partial(compressed, 4)),
    "compressed-tensors int4 zeros": Row(functools.partial(compressed, 4, symmetric=False)),
    "compressed-tensors int8": Row(functools.partial(compressed, 8, groups=False)),
    "compressed-tensors W8A8": Row(functools.partial(compressed, 8, groups=False, activations=True), exact=False),
    "GPTQ int4": Row(functools.partial(gptq, 4)),
    "GPTQ int4 shuffled": Row(functools.partial(gptq, 4, shuffled=True)),
    "GPTQ int8 v2": Row(functools.partial(gptq, 8, version=2)),
}


def quantized(name, model, dtype=torch.float32):
    """A copy of a model in ``dtype`` with all its linear layers in a format, not taken over yet."""
    model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, nn.Linear):
                parent._modules[attribute] = ROWS[name].make(child, dtype)
    return model


def adopted(name, model, dtype=torch.float32):
    """The same, taken over."""
    made = quantized(name, model, dtype)
    assert bool(adopt(made)) == ROWS[name].adopts
    return made
