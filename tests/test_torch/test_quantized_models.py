"""Whole models in each quantized format, as transformers loads them, and what is refused by name."""

import logging
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from quantized_layers import ROWS, adopted, gguf_blocks, quantized
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from eggroll import _optional
from eggroll._optional import require
from eggroll.errors import MissingExtraError, ModelError, UnsupportedOperationError
from eggroll.torch import Population
from eggroll.torch.kernels import gguf_c
from eggroll.torch.quantized import gguf as gguf_format
from eggroll.torch.quantized.adopt import adopt, grids, released
from eggroll.torch.quantized.gguf import GgufGrid
from eggroll.torch.quantized.gptq import GptqLinear, put_layers
from eggroll.torch.quantized.tensor import as_parameter

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}


def llama(**more):
    torch.manual_seed(2)
    config = LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None, pad_token_id=0, **more
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", ROWS)
def test_a_llama_writes_what_single_members_write(name):
    model = adopted(name, llama())
    assert len(grids(model)) == 15  # 7 in each layer, and the head
    population = Population(model, population_size=4, sigma=0.05, rank=2, seed=3, kinds=("matrix", "embedding"))
    assert len(population.specs) == 16
    ids = torch.randint(1, 96, (4, 5))
    words = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with population.perturbed(1):
        together = model.generate(ids, **words)
    words["attention_mask"] = words["attention_mask"][:1]
    for p in range(4):
        with population.member(1, p):
            alone = model.generate(ids[p : p + 1], **words)
        assert torch.equal(alone[0], together[p])
    assert len({tuple(row[5:].tolist()) for row in together}) == 4


def test_gguf_with_a_tied_embedding():
    model = llama(tie_word_embeddings=True)
    blocks = gguf_blocks("Q8_0", model.model.embed_tokens.weight)
    weight = as_parameter(GgufGrid(blocks, "Q8_0", torch.float32))
    model.model.embed_tokens._parameters["weight"] = model.lm_head._parameters["weight"] = weight
    assert list(grids(model)) == ["model.embed_tokens.weight"]
    population = Population(model, population_size=4, sigma=0.05, rank=1, target_modules=["embed_tokens"])
    ids = torch.randint(1, 96, (8, 5))
    assert population.verify(input_ids=ids) < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes_as_transformers_loads_it(kind, tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    bits = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**bits), device_map={"": "cpu"}, dtype=torch.bfloat16
    ).eval()
    assert adopt(model) == 14  # transformers leaves the head alone
    held = grids(model)
    assert all(grid.dtype == torch.bfloat16 for grid in held.values())
    population = Population(model, population_size=4, sigma=0.02, rank=1, kinds=("matrix",))
    assert len(population.specs) == 15
    population.verify(input_ids=torch.randint(1, 96, (4, 5)))
    grid = held["model.layers.0.mlp.up_proj.weight"]
    grid.set_codes(grid.codes().flip(0))
    with released(model):
        model.save_pretrained(tmp_path / "moved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert adopt(again) == 14
    assert all(torch.equal(grid.codes(), held[name].codes()) for name, grid in grids(again).items())


def test_compressed_tensors_as_transformers_loads_it(tmp_path):
    names = require("compressed_tensors.quantization", extra="quantized")
    compressors = require("compressed_tensors.compressors", extra="quantized")
    plain = llama()
    plain.save_pretrained(tmp_path / "plain")
    weights = names.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = names.QuantizationScheme(targets=["Linear"], weights=weights)
    config = names.QuantizationConfig(
        config_groups={"all": scheme}, format="pack-quantized", ignore=["lm_head"], quantization_status="compressed"
    )
    names.apply_quantization_config(plain, config)
    for module in plain.modules():
        if hasattr(module, "weight_scale"):
            grouped = module.weight.data.view(module.weight.shape[0], -1, 32)
            module.weight_scale.data.copy_(grouped.abs().amax(-1) / 7)
            compressors.compress_module(module)
    plain.config.quantization_config = config.model_dump() | {"quant_method": "compressed-tensors"}
    written = {key: value.contiguous() for key, value in plain.state_dict().items()}
    plain.config.save_pretrained(tmp_path / "packed")
    require("safetensors.torch", extra="torch").save_file(
        written, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"}
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    assert adopt(model) == 14
    ids = torch.randint(1, 96, (4, 5))
    model(input_ids=ids)  # which would have expanded the model
    packed = model.state_dict()
    assert len(grids(model)) == 14
    population = Population(model, population_size=4, sigma=0.02, rank=1, kinds=("matrix",))
    assert population.verify(input_ids=ids) < 1e-4
    with released(model):
        given_back = model.state_dict()
        assert given_back.keys() == written.keys()
        assert all(torch.equal(given_back[key], value) for key, value in written.items())
    assert packed.keys() == model.state_dict().keys()


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_a_gptq_checkpoint_is_read_as_it_is_published(layout):
    version = 2 if layout == "gptq_v2" else 1
    made = quantized("GPTQ int4", nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32, bias=False)))
    for module in made:
        if isinstance(module, GptqLinear) and version == 2:
            module.version = 2
            module.qzeros += 0x11111111  # the zero point itself in each word
    checkpoint = made.state_dict()
    assert set(checkpoint) == {
        f"{place}.{name}" for place in "02" for name in ("qweight", "qzeros", "scales", "g_idx")
    } | {"0.bias"}
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))
    assert put_layers(model, checkpoint, {"bits": 4, "group_size": 32, "checkpoint_format": layout}) == 2
    model.load_state_dict(checkpoint, assign=True)
    x = torch.randn(3, 64)
    expected = made(x)
    assert torch.equal(model(x), expected)
    assert adopt(model) == 2
    assert torch.allclose(model(x), expected, atol=1e-6)
    with pytest.raises(ModelError, match=r"bits=3 and checkpoint_format='gptq'; known are bits 2, 4, 8"):
        put_layers(model, checkpoint, {"bits": 3})


class HQQLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.W_q = nn.Parameter(torch.zeros(16, 8, dtype=torch.uint8), requires_grad=False)


class WQLinear_GEMM(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(16, 2, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(1, 2, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(1, 16))


class FP8Linear(nn.Linear):
    def __init__(self):
        super().__init__(16, 8)
        self.weight = nn.Parameter(self.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (HQQLinear, "HQQ"),
        (WQLinear_GEMM, "AWQ"),
        (FP8Linear, "FP8"),
        (Strange, r"int8 codes of \S+ Strange"),
    ],
)
def test_other_formats_are_refused(layer, what):
    model = nn.Sequential(OrderedDict(plain=nn.Linear(4, 4), block=nn.Sequential(layer())))
    message = (
        rf"weights of {layer.__name__} in layer 'block\.0' are quantized as {what}, which cannot be moved; known: "
        r"torchao int8 and intx weight-only, bitsandbytes int8, .*, GGUF Q8_0, Q4_0 and Q4_1\. Load .* quantize='none'"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        adopt(model)
    message = rf"'block\.0\.weight' is quantized \({what}\), and such weights cannot be moved; .*exclude=\['block\.0"
    with pytest.raises(UnsupportedOperationError, match=message):
        Population(model, population_size=4)
    assert len(Population(model, population_size=4, target_modules=["plain.weight"]).specs) == 1


def test_other_tensors_of_a_known_library_are_refused():
    quantization = require("torchao.quantization", extra="quantized")
    model = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    with pytest.raises(UnsupportedOperationError, match=r"layer '0' are quantized as torchao's Float8Tensor"):
        adopt(model)
    tensor_wise = quantization.Int8DynamicActivationInt8WeightConfig(granularity=quantization.PerTensor())
    model = nn.Sequential(nn.Linear(32, 32))
    quantization.quantize_(model, tensor_wise)
    with pytest.raises(UnsupportedOperationError, match=r"layer '0' are quantized as torchao's Int8Tensor"):
        adopt(model)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.adopts])
def test_a_population_of_weights_that_were_not_taken_over(name):
    raw = quantized(name, nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)))
    message = r"parameter '1\.weight' is quantized \(.*were not taken over: call eggroll\.torch\.quantized\.adopt\."
    for choice in ({}, {"target_modules": ["1"]}, {"kinds": ("matrix",)}):
        with pytest.raises(UnsupportedOperationError, match=message):
            Population(raw, population_size=4, **choice)
    left = Population(raw, population_size=4, exclude=["1.weight"])  # as the message says
    assert "0.weight" in left.names
    assert "1.weight" not in left.names
    adopt(raw)
    assert "1.weight" in Population(raw, population_size=4).names


def test_the_model_itself_cannot_be_replaced():
    raw = quantized("bitsandbytes nf4", nn.Sequential(nn.Linear(64, 32)))[0]
    with pytest.raises(UnsupportedOperationError, match=r"the model itself is a quantized Linear4bit; put it into a"):
        adopt(raw)


def test_integers_that_are_left_out_are_said(caplog):
    model = nn.Sequential(nn.Linear(4, 4))
    model.table = nn.Parameter(torch.zeros(4, 4, dtype=torch.int16), requires_grad=False)
    with caplog.at_level(logging.WARNING):
        Population(model, population_size=4)
    assert "1 parameters are left as they are, as noise cannot be added to their dtype: table (int16)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.skipif(bool(gguf_c.why_not()), reason=str(gguf_c.why_not()))
def test_c_and_plain_operations_unpack_the_same_bits(kind, dtype, monkeypatch):
    grid = GgufGrid(gguf_blocks(kind, torch.randn(37, 96) * 3), kind, dtype)
    choices = [None, slice(5, 20), torch.tensor([3, 36, 3])]
    in_c = [grid.dequantized(dtype, rows) for rows in choices]
    many = grid.dequantized(torch.float32)
    monkeypatch.setattr(gguf_c, "PARALLEL_FROM", 0)
    shared_out = grid.dequantized(torch.float32)
    monkeypatch.setenv("EGGROLL_NO_C", "1")
    gguf_c._entry.cache_clear()
    try:
        assert gguf_c.why_not(dtype) == "EGGROLL_NO_C is set"
        for rows, expected in zip(choices, in_c, strict=True):
            assert torch.equal(grid.dequantized(dtype, rows), expected)
        assert torch.equal(grid.dequantized(torch.float32), many)
        assert torch.equal(shared_out, many)
    finally:
        gguf_c._entry.cache_clear()


def test_unknown_gguf_blocks():
    assert set(gguf_format.TYPES) == {"Q8_0", "Q4_0", "Q4_1"}
    with pytest.raises(KeyError):
        GgufGrid(torch.zeros(4, 144, dtype=torch.uint8), "Q4_K", torch.float32)


def test_a_missing_library_is_said_with_its_pip_line(monkeypatch):
    model = adopted("bitsandbytes nf4", nn.Sequential(nn.Linear(64, 32)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"'bitsandbytes' is needed here.*pip install .*\[quantized\]"):
        model(torch.zeros(2, 64))


def test_lines_about_other_machines_kernels_are_left_out(caplog):
    _optional._hush()
    torchao, tree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    with caplog.at_level(logging.WARNING):
        torchao.warning("Failed to load /x/_C_cutlass_90a.abi3.so: Could not load this library")
        tree.warning("%s is an Enum subclass and is now natively supported", int)
        torchao.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


@pytest.mark.slow
def test_importing_the_libraries_says_nothing():
    code = "from eggroll._optional import require\n" + "".join(
        f"require({name!r}, extra='quantized')\n"
        for name in ("torchao.quantization", "bitsandbytes", "compressed_tensors")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout + done.stderr == ""
