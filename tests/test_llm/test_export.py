"""Saved models load with plain transformers."""

import json
import os
import re
import stat

import pytest
import torch
import transformers

from eggroll.errors import ModelError
from eggroll.llm.models.export import load_line, save_pretrained
from eggroll.llm.models.hub import drop_quantization

METADATA = {
    "base_model": "owner/base",
    "reward": "score.py",
    "generations": 3,
    "heldout_before": 0.25,
    "heldout_after": 0.5,
    "config": {"population_size": 8, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_loads_with_plain_transformers(build_model, tiny_tokenizer, tmp_path, name):
    model = build_model(name)
    saved = save_pretrained(model, tiny_tokenizer, tmp_path / "out", metadata=METADATA)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    tied = model.config.tie_word_embeddings
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_bfloat16_and_encoder_decoder(build_model, tiny_tokenizer, tmp_path):
    model = build_model("t5", torch.bfloat16)
    saved = save_pretrained(model, tiny_tokenizer, tmp_path / "out", metadata={})
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(saved)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert "AutoModelForSeq2SeqLM.from_pretrained" in (saved / "README.md").read_text()


def test_card_and_details(tiny_model, tiny_tokenizer, tmp_path):
    saved = save_pretrained(tiny_model, tiny_tokenizer, tmp_path / "evolved-model", metadata=METADATA)
    details = json.loads((saved / "eggroll.json").read_text())
    assert METADATA.items() <= details.items()
    assert details["eggroll_version"]
    card = (saved / "README.md").read_text()
    header, body = card.split("---\n")[1:]
    assert 'base_model: "owner/base"' in header
    assert "pipeline_tag: text-generation" in header
    for text in (
        "# evolved-model",
        "| reward | score.py |",
        "| heldout_after | 0.5 |",
        '| target_modules | ["q_proj"] |',
        'model = AutoModelForCausalLM.from_pretrained("evolved-model")',
    ):
        assert text in body
    assert load_line("x") == 'AutoModelForCausalLM.from_pretrained("x")'


def test_base_model_that_is_no_hub_id_is_not_in_the_header(tiny_model, tmp_path):
    saved = save_pretrained(tiny_model, None, tmp_path / "out", metadata={"base_model": "/home/me/model"})
    header = (saved / "README.md").read_text().split("---\n")[1]
    assert "base_model" not in header


def test_replaces_files_and_keeps_others(build_model, tiny_tokenizer, tmp_path):
    target = tmp_path / "out"
    save_pretrained(build_model("llama"), tiny_tokenizer, target, metadata={"generations": 1})
    (target / "notes.txt").write_text("mine")
    second = build_model("gpt2")
    save_pretrained(second, tiny_tokenizer, target, metadata={"generations": 2})
    assert (target / "notes.txt").read_text() == "mine"
    assert json.loads((target / "eggroll.json").read_text())["generations"] == 2
    assert transformers.AutoModelForCausalLM.from_pretrained(target).config.model_type == "gpt2"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_are_readable_as_any_other(tiny_model, tmp_path):
    saved = save_pretrained(tiny_model, None, tmp_path / "out", metadata={})
    plain = tmp_path / "plain"
    plain.write_text("x")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


def test_failure_leaves_the_old_model(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    target = tmp_path / "out"
    save_pretrained(tiny_model, tiny_tokenizer, target, metadata={"generations": 1})
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tiny_tokenizer.__class__, "save_pretrained", full)
    message = f"the model cannot be saved to {target}: [Errno 28] No space left on device. Give another directory"
    with pytest.raises(ModelError, match=re.escape(message)):
        save_pretrained(tiny_model, tiny_tokenizer, target, metadata={"generations": 2})
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_target_is_a_file(tiny_model, tmp_path):
    target = tmp_path / "out"
    target.write_text("x")
    with pytest.raises(ModelError, match="it is a file; give a directory"):
        save_pretrained(tiny_model, None, target, metadata={})


def test_gguf_leftovers_are_dropped_and_other_quantization_is_not(tiny_model):
    tiny_model.config.quantization_config = {"quant_method": "gguf"}
    tiny_model.hf_quantizer = object()
    drop_quantization(tiny_model)
    assert not hasattr(tiny_model.config, "quantization_config")
    assert not hasattr(tiny_model, "hf_quantizer")
    tiny_model.config.quantization_config = {"quant_method": "bitsandbytes"}
    drop_quantization(tiny_model)
    assert tiny_model.config.quantization_config == {"quant_method": "bitsandbytes"}
