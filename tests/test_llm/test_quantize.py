"""Models loaded in a quantized format: they compute what their expanded twins do, and are saved as they came."""

import json

import gguf
import numpy as np
import pytest
import torch
import transformers
from quantized_layers import gptq
from safetensors.torch import load_file, save_file
from tiny_models import write_gguf, write_llama
from transformers import modeling_gguf_pytorch_utils as gguf_names

from eggroll import EggrollTrainer, llm
from eggroll.errors import ConfigError, ModelError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.estimate.memory import Estimate
from eggroll.llm.models import gguf_file
from eggroll.llm.models.export import load_line, save_pretrained
from eggroll.llm.models.gguf_file import save_gguf
from eggroll.llm.models.outline import Outline, look_up
from eggroll.torch.quantized.adopt import grids

IDS = torch.arange(3, 15)[None]
KINDS = ("Q8_0", "Q4_0", "Q4_1")


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Llama whose widths are multiples of 32, as int4 wants them."""
    return write_llama(tmp_path_factory.mktemp("llama") / "even", hidden_size=64, intermediate_size=96)


def expanded(model):
    """The same model with plain weights: the numbers that its codes stand for."""
    twin = transformers.LlamaForCausalLM(model.config.__class__(**plain_config(model.config))).eval()
    state = {name: value for name, value in model.state_dict().items() if name not in grids(model)}
    state |= {name: grid.dequantized() for name, grid in grids(model).items()}
    twin.load_state_dict(state, strict=False)
    return twin


def plain_config(config):
    return {key: value for key, value in config.to_dict().items() if key != "quantization_config"}


def bump(model):
    """Move some codes of every weight by one, and say how many."""
    moved = 0
    for grid in grids(model).values():
        delta = torch.zeros(grid.shape, dtype=torch.int16)
        delta[0, ::7] = 1
        delta[grid.codes() == grid.high] = 0
        grid.move(delta)
        moved += int(delta.sum())
    return moved


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_plain_weights_are_quantized_and_saved_in_that_format(directory, form, tmp_path):
    loaded = llm.load(str(directory), dtype="float32", quantize=form)
    found = grids(loaded.model)
    assert len(found) == 14
    assert {grid.format for grid in found.values()} == {f"torchao {form}"}
    assert any(f"14 weights in torchao {form}" in note for note in loaded.notes)
    assert not any("embed" in name or "lm_head" in name for name in found)
    torch.testing.assert_close(logits(loaded.model), logits(expanded(loaded.model)), rtol=1e-4, atol=1e-4)

    before = logits(loaded.model)
    assert bump(loaded.model)
    moved = logits(loaded.model)
    assert not torch.equal(before, moved)
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    assert torch.equal(logits(loaded.model), moved)  # saving left everything as it was
    again = llm.load(str(saved), dtype="float32")
    assert {grid.format for grid in grids(again.model).values()} == {f"torchao {form}"}
    assert torch.equal(logits(again.model), moved)
    own = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype="float32")
    assert torch.equal(logits(own), moved)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_stays_gguf(kind, tmp_path):
    path = write_gguf(tmp_path / f"tiny-{kind}.gguf", kind)
    loaded = llm.load(str(path), dtype="float32")
    assert {grid.format for grid in grids(loaded.model).values()} == {f"GGUF {kind}"}
    assert len(grids(loaded.model)) == 8
    plain = llm.load(str(path), dtype="float32", quantize="none")
    assert not grids(plain.model)
    torch.testing.assert_close(logits(loaded.model), logits(plain.model), rtol=1e-5, atol=1e-5)

    assert save_gguf(loaded.model, tmp_path / "same.gguf").read_bytes() == path.read_bytes()
    assert bump(loaded.model)
    moved = logits(loaded.model)
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", "eggroll.json", "model.gguf"]
    assert load_line(saved) == f'AutoModelForCausalLM.from_pretrained("{saved}", gguf_file="model.gguf")'
    assert 'gguf_file="model.gguf"' in (saved / "README.md").read_text()
    assert torch.equal(logits(llm.load(str(saved), dtype="float32").model), moved)
    own = transformers.AutoModelForCausalLM.from_pretrained(saved, gguf_file="model.gguf", dtype="float32")
    torch.testing.assert_close(logits(own), moved, rtol=1e-5, atol=1e-5)


def test_a_norm_that_was_trained_is_written_to_the_file(tmp_path):
    loaded = llm.load(str(write_gguf(tmp_path / "a.gguf")), dtype="float32")
    with torch.no_grad():
        loaded.model.model.norm.weight.add_(0.5)
    out = save_gguf(loaded.model, tmp_path / "b.gguf")
    tensor = next(tensor for tensor in gguf.GGUFReader(str(out)).tensors if tensor.name == "output_norm.weight")
    np.testing.assert_array_equal(tensor.data, loaded.model.model.norm.weight.numpy())


def test_a_format_that_cannot_be_moved_is_expanded_and_said(tmp_path):
    path = write_gguf(tmp_path / "five.gguf", "Q5_0")
    loaded = llm.load(str(path), dtype="float32")
    assert not grids(loaded.model)
    assert loaded.model.gguf_source.expanded == {"Q5_0": 8}
    assert save_gguf(loaded.model, tmp_path / "same.gguf").read_bytes() == path.read_bytes()
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-5  # less than bfloat16 could show
    with pytest.raises(ModelError, match=r"up_proj\.weight' is in a form in the GGUF file that cannot be written"):
        save_gguf(loaded.model, tmp_path / "other.gguf")
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    assert "gguf" not in load_line(saved)
    assert torch.equal(logits(llm.load(str(saved), dtype="float32").model), logits(loaded.model))


def test_a_file_that_is_gone_cannot_be_written_again(tmp_path):
    path = write_gguf(tmp_path / "five.gguf", "Q8_0")
    loaded = llm.load(str(path), dtype="float32")
    path.unlink()
    with pytest.raises(
        ModelError, match=r"five\.gguf, which the model came from, is gone; save a Hugging Face directory"
    ):
        save_gguf(loaded.model, tmp_path / "other.gguf")
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    assert torch.equal(logits(llm.load(str(saved), dtype="float32").model), logits(loaded.model))


def test_a_mixed_file_is_saved_expanded_once_more_than_its_blocks_changed(tmp_path):
    loaded = llm.load(str(write_gguf(tmp_path / "mixed.gguf", "Q4_1")), dtype="float32")
    weight = loaded.model.model.layers[0].input_layernorm.weight
    loaded.model.gguf_source.fixed["model.layers.0.input_layernorm.weight"] = [
        "output_norm.weight"
    ]  # not what it holds
    with torch.no_grad():
        weight.add_(0.5)
    assert bump(loaded.model)
    held, moved = grids(loaded.model), logits(loaded.model)
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    assert grids(loaded.model) == held  # saving left everything as it was
    again = llm.load(str(saved), dtype="float32").model
    assert not grids(again)
    torch.testing.assert_close(logits(again), moved, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_merged_are_expanded(tmp_path, monkeypatch):
    """As experts are, whose processors want to know the parameters that are made so far."""

    class Merging(gguf_names.LlamaTensorProcessor):
        def process(self, weights, name, **kwargs):
            assert kwargs["parsed_parameters"] is not None
            return super().process(weights, name, **kwargs)

    path = str(write_gguf(tmp_path / "tiny.gguf"))
    plain = llm.load(path, dtype="float32", quantize="none")
    monkeypatch.setitem(gguf_names.TENSOR_PROCESSORS, "llama", Merging)
    loaded = llm.load(path, dtype="float32")
    assert not grids(loaded.model)
    assert any("is made of several tensors of" in note and "expanded" in note for note in loaded.notes)
    assert torch.equal(logits(loaded.model), logits(plain.model))


@pytest.mark.parametrize("quantize", ["auto", "none"])
def test_architectures_that_transformers_reads_otherwise_are_left_to_it(quantize, tmp_path, monkeypatch):
    path = str(write_gguf(tmp_path / "tiny.gguf"))
    plain = llm.load(path, dtype="float32", quantize="none")
    monkeypatch.setattr(gguf_file, "_has_own_reader", lambda architecture: architecture == "llama")
    loaded = llm.load(path, dtype="float32", quantize=quantize)
    assert not grids(loaded.model)
    assert any("architecture 'llama' in a way of its own" in note for note in loaded.notes) == (quantize == "auto")
    assert torch.equal(logits(loaded.model), logits(plain.model))


def test_bad_combinations(directory, tmp_path):
    with pytest.raises(ConfigError, match=r"quantize \(='int3'\) must be one of: auto, none, int8, int4, gguf"):
        llm.load(str(directory), quantize="int3")
    with pytest.raises(ModelError, match=r"has no GGUF file; give a \.gguf file, or quantize='int8' or 'int4'"):
        llm.load(str(directory), quantize="gguf")
    anchored = EggrollConfig(anchored_weight_decay=0.5)
    with pytest.raises(ConfigError, match=r"anchored_weight_decay \(=0.5\) needs a copy of the start.*quantize='none'"):
        EggrollTrainer.from_model_id(str(directory), anchored, len, quantize="int8")
    loaded = llm.load(str(directory), dtype="float32", quantize="int8")
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    with pytest.raises(ModelError, match=r"are quantized already \(torchao\), and stay in that format"):
        llm.load(str(saved), quantize="int4")
    with pytest.raises(ModelError, match="only a model that was loaded from a GGUF file"):
        save_gguf(loaded.model, tmp_path / "x.gguf")


@pytest.mark.parametrize("form", ["int8", "int4", "Q4_1"])
def test_the_estimate_counts_what_there_is(directory, tmp_path, form):
    source = str(write_gguf(tmp_path / "tiny.gguf", form) if form == "Q4_1" else directory)
    quantize = "auto" if form == "Q4_1" else form
    config = EggrollConfig(population_size=4, rank=1, optimizer="sgd")
    expected = Estimate.of(look_up(source, dtype="bfloat16", quantize=quantize).outline, config, torch.bfloat16).fixed()
    model = llm.load(source, dtype="bfloat16", quantize=quantize).model
    counted = Estimate.of(Outline.of(model), config, torch.bfloat16).fixed()
    held = grids(model)
    plain = sum(x.nbytes for name, x in model.named_parameters() if name not in held)
    assert counted["weights"] == expected["weights"] == plain
    assert counted["codes"] + counted["scales"] == sum(
        sum(grid.bits) * grid.shape.numel() / 8 for grid in held.values()
    )
    assert expected["codes"] == counted["codes"]
    assert expected["scales"] == pytest.approx(counted["scales"], rel=0.25)
    evolved = [grid for name, grid in held.items() if "embed" not in name]
    assert counted["residual"] == 2 * sum(grid.shape.numel() for grid in evolved)
    assert counted["masters"] == 0


def write_gptq(folder, **changes):
    """A Llama whose linear layers are in GPTQ's layout, as its libraries save it."""
    write_llama(folder, hidden_size=64, intermediate_size=96)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, gptq(4, module, torch.float32, shuffled=name.endswith("v_proj")))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name in changes.pop("without", ()):
        tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model.eval()


def test_a_gptq_checkpoint_is_loaded_by_its_name_and_trained_and_saved_as_one(tmp_path):
    folder, made = write_gptq(tmp_path / "gptq")
    loaded = llm.load(str(folder), dtype="float32")
    assert loaded.notes[-1] == "quantized: 14 weights in GPTQ int4"
    assert torch.allclose(logits(loaded.model), logits(made), atol=1e-5)
    assert bump(loaded.model) > 0
    moved = logits(loaded.model)
    assert not torch.allclose(moved, logits(made), atol=1e-3)
    save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "saved", metadata={})
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(written) == set(load_file(folder / "model.safetensors"))
    assert torch.equal(logits(llm.load(str(tmp_path / "saved"), dtype="float32").model), moved)


def test_a_gptq_checkpoint_that_cannot_be_read_is_refused(tmp_path):
    folder, _ = write_gptq(tmp_path / "three", bits=3)
    with pytest.raises(ModelError, match=r"bits=3 and checkpoint_format='gptq'; known are bits 2, 4, 8"):
        llm.load(str(folder))
    folder, _ = write_gptq(tmp_path / "part", without=["model.norm.weight"])
    with pytest.raises(ModelError, match=r"lacks 1 of the model's parameters \(the first is 'model.norm.weight'\)"):
        llm.load(str(folder))
    folder, _ = write_gptq(tmp_path / "none")
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"says that it is a GPTQ checkpoint, but has no tensors named \*.qweight"):
        llm.load(str(folder))
