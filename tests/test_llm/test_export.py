"""Saved models load with plain transformers."""

import json
import os
import re
import stat

import pytest
import torch
import transformers

from eggroll.errors import ModelError
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example
from eggroll.llm.measure.answers import Writer
from eggroll.llm.models.export import answer_lines, load_line, save_pretrained, settings_of
from eggroll.llm.models.hub import drop_quantization
from eggroll.llm.models.loading import load

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


NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}<|assistant|>"
)


@pytest.mark.parametrize("form", ["chat", "chat without system", "text", "not chat"])
def test_the_printed_lines_give_the_answer_of_the_training(build_model, tiny_tokenizer, tmp_path, capsys, form):
    """Word for word what an evaluation in the run would write: system prompt, template, number of tokens."""
    template = {"chat without system": NO_SYSTEM, "text": None}.get(form, tiny_tokenizer.chat_template)
    settings = {"system": 'Say "yes".', "max_tokens": 5, "chat": False if form == "not chat" else None}
    tiny_tokenizer.chat_template = template
    saved = save_pretrained(build_model("llama"), tiny_tokenizer, tmp_path / "out", metadata={"config": settings})
    exec(answer_lines(saved), {})
    loaded = load(str(saved), dtype="float32")
    (wanted,), _ = Writer(loaded, EggrollConfig(**settings)).write([Example("What is rain?")], 0)
    assert capsys.readouterr().out == f"{wanted}\n"
    (plain,), _ = Writer(loaded, EggrollConfig(**{**settings, "system": None})).write([Example("What is rain?")], 0)
    assert plain != wanted


def test_the_printed_lines_for_encoders_and_for_what_cannot_be_asked(build_model, tiny_tokenizer, tmp_path, capsys):
    saved = save_pretrained(build_model("t5"), tiny_tokenizer, tmp_path / "t5", metadata={"config": {"max_tokens": 4}})
    exec(answer_lines(saved), {})
    (wanted,), _ = Writer(load(str(saved), dtype="float32"), EggrollConfig(max_tokens=4)).write(
        [Example("What is rain?")], 0
    )
    assert capsys.readouterr().out == f"{wanted}\n"
    saved = save_pretrained(build_model("llama"), None, tmp_path / "bare", metadata={})
    assert answer_lines(saved) == (
        f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{saved}")'
    )
    (saved / "eggroll.json").write_text('{"auto_class": "AutoModelForCausalLM"}')  # of an older version
    assert answer_lines(saved).endswith(f'tokenizer = AutoTokenizer.from_pretrained("{saved}")')


def test_what_a_model_says_of_itself_runs_no_code(tmp_path):
    evil = {"system": '"); evil("\n', "max_tokens": "evil()", "chat": 1}
    details = {"prompt_form": "chat", "config": evil}
    (tmp_path / "eggroll.json").write_text(json.dumps(details))
    lines = answer_lines(tmp_path)
    assert '"content": "\\"); evil(\\"\\n"}' in lines
    assert "max_new_tokens=128" in lines
    assert settings_of(tmp_path) == {"system": evil["system"]}
    (tmp_path / "eggroll.json").write_text(json.dumps({"prompt_form": "evil()", "config": 5}))
    assert "evil" not in answer_lines(tmp_path)


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
