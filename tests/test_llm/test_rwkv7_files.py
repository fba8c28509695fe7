"""RWKV-7 checkpoints in and out, the World tokenizer, and files that are none."""

import pickle

import pytest
import torch
from rwkv7_models import saved_pth, tiny_rwkv7

import eggroll.llm
from eggroll.core.rwkv7 import from_layout, to_layout
from eggroll.errors import MissingExtraError, ModelError
from eggroll.llm.backends.build import load_surroundings
from eggroll.llm.models.export import load_line, save_pretrained
from eggroll.llm.models.outline import look_up
from eggroll.llm.rwkv7 import tokenizer as tokenizers
from eggroll.llm.rwkv7.tokenizer import RWKV7Tokenizer
from eggroll.llm.rwkv7.weights import read_pth, save_pth

SCRIPTS = {
    "Latin": "The quick brown fox, naïve café",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα",
    "Cyrillic": "Съешь ещё этих булок",
    "Hebrew": "דג סקרן שט בים",
    "Arabic": "نص حكيم له سر قاطع",
    "Devanagari": "ऋषियों को सताने वाले",
    "Thai": "เป็นมนุษย์สุดประเสริฐ",
    "Chinese": "視野無限廣，窗外有藍天",
    "Japanese": "いろはにほへと ちりぬるを",
    "Korean": "키스의 고유조건은",
    "emoji": "🎉🚀\t\n\n\x00 x",
}


@pytest.fixture(scope="module")
def reference():
    """The original package's tokenizer."""
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    return TRIE_TOKENIZER(str(tokenizers.find_vocabulary()))


def test_a_file_goes_in_and_out_unchanged(tmp_path):
    path = saved_pth(tmp_path, tiny_rwkv7().bfloat16())
    before = torch.load(path, weights_only=True)
    before |= {
        f"blocks.0.att.v{n}": torch.randn(shape).bfloat16() for n, shape in enumerate([(1, 1, 64), (64, 8), (8, 64)])
    }
    torch.save(before, path)
    loaded = eggroll.llm.load(str(path), dtype="bfloat16")
    assert (loaded.name, loaded.tokenizer.pad_token_id) == ("tiny", 0)
    save_pth(loaded.model, tmp_path / "out.pth")
    after = torch.load(tmp_path / "out.pth", weights_only=True)
    assert after.keys() == before.keys()
    assert all(after[name].shape == before[name].shape and torch.equal(after[name], before[name]) for name in before)
    assert before["blocks.0.att.x_r"].shape == (1, 1, 64)
    assert before["blocks.0.att.r_k"].shape == (2, 32)


@pytest.mark.parametrize("layout", ["original", "fla"])
def test_layouts_are_inverses(layout):
    model = tiny_rwkv7()
    theirs = to_layout(model.state_dict(), layout, model.config.head_dim)
    ours = from_layout(theirs, layout)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_a_saved_model_is_a_directory_and_a_file(tmp_path):
    path = saved_pth(tmp_path)
    first = eggroll.llm.load(str(path), dtype="float32")
    first.model.save_pretrained(tmp_path / "saved")
    first.tokenizer.save_pretrained(tmp_path / "saved")
    ids = torch.arange(1, 20)[None]
    for source in ("saved", "saved/rwkv7.pth"):
        again = eggroll.llm.load(str(tmp_path / source), dtype="float32")
        assert torch.equal(again.model(ids).logits, first.model(ids).logits)
        assert again.tokenizer("some text").input_ids == first.tokenizer("some text").input_ids
        assert again.tokenizer.chat_template == first.tokenizer.chat_template


def test_a_directory_with_the_original_names_loads(tmp_path):
    from safetensors.torch import save_file

    model = tiny_rwkv7()
    model.config.save_pretrained(tmp_path)
    save_file(to_layout(model.state_dict(), "original", model.config.head_dim), tmp_path / "model.safetensors")
    loaded = eggroll.llm.load(str(tmp_path), dtype="float32").model
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_code_that_comes_with_a_directory_is_not_run(tmp_path):
    import json

    model = tiny_rwkv7()
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    assert type(eggroll.llm.load(str(tmp_path), dtype="float32").model) is type(model)


def test_the_outline_needs_no_weights(tmp_path):
    model = tiny_rwkv7()
    found = look_up(str(saved_pth(tmp_path, model)), dtype="float32").outline
    assert found.size == sum(parameter.numel() for parameter in model.parameters())
    assert (found.layers, found.width, found.state) == (3, 64, 64 * 32)
    assert found.head == ("head.weight",)


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_goes_through_the_tokenizer_and_back(script, reference):
    tokenizer, text = RWKV7Tokenizer(), SCRIPTS[script]
    ids = tokenizer(text).input_ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 0], skip_special_tokens=True) == text


def test_batches_of_text_are_padded_on_the_left():
    tokenizer = RWKV7Tokenizer(padding_side="left")
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"][0][0] == 0
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": " hi "}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "User: hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "version"),
    [("att.time_first", "RWKV-4"), ("att.time_faaaa", "RWKV-5"), ("att.time_maa_x", "RWKV-6")],
)
def test_older_generations_are_named(tmp_path, name, version):
    torch.save({f"blocks.0.{name}": torch.zeros(3), "emb.weight": torch.zeros(3, 3)}, tmp_path / "old.pth")
    with pytest.raises(ModelError, match=rf"old\.pth is {version}; of the RWKV models, RWKV-7 is supported"):
        eggroll.llm.load(str(tmp_path / "old.pth"))


class _Code:
    def __reduce__(self):
        return print, ("code of a file was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Code(), "cannot be read as a file of tensors"),
        ({"a": 3}, "holds a dict and not a dictionary of tensors only"),
        ([torch.zeros(2)], "holds a list and not"),
        ({"other.weight": torch.zeros(2)}, r"holds no RWKV-7 model.*Its tensors are other.weight"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message, capfd):
    path = tmp_path / "bad.pth"
    torch.save(content, path)
    with pytest.raises(ModelError, match=message):
        eggroll.llm.load(str(path))
    assert "code of a file was run" not in capfd.readouterr().out


def test_other_broken_files(tmp_path):
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "short.pth").write_bytes(saved_pth(tmp_path).read_bytes()[:1000])
    for name in ("plain", "short"):
        with pytest.raises(ModelError, match="cannot be read as a file of tensors"):
            eggroll.llm.load(str(tmp_path / f"{name}.pth"))
    tensors = dict(read_pth(saved_pth(tmp_path)))
    del tensors["blocks.1.att.w2"]
    tensors["ln_out.bias"] = torch.zeros(7)
    torch.save(tensors, tmp_path / "less.pth")
    with pytest.raises(ModelError, match=r"does not fit its configuration: .*blocks\.1\.att\.w2 \(is missing, must be"):
        eggroll.llm.load(str(tmp_path / "less.pth"))
    with pytest.raises(ModelError, match=r"gone\.pth does not exist\. Near matches"):
        eggroll.llm.load(str(tmp_path / "gone.pth"))


def test_other_backends_are_refused(tmp_path):
    tiny_rwkv7().save_pretrained(tmp_path / "directory")
    for source in (saved_pth(tmp_path), tmp_path / "directory"):
        with pytest.raises(ModelError, match="is an RWKV-7 model, which this backend does not serve"):
            load_surroundings(str(source))


def test_the_printed_line_loads_a_saved_model(tmp_path, monkeypatch):
    """In a process that has imported nothing of eggroll, transformers does not know the model."""
    model = tiny_rwkv7(vocab_size=65536, width=32, head_dim=16, layers=1)
    settings = {"system": "Be brief.", "max_tokens": 3}
    save_pretrained(model, RWKV7Tokenizer(), tmp_path / "saved", metadata={"config": settings})
    line = load_line(tmp_path / "saved")
    assert line == f'eggroll.llm.load("{tmp_path}/saved").model'
    loaded = eval(line, {"eggroll": eggroll})
    found = loaded.state_dict()  # in the dtype that is the faster one here
    assert all(torch.equal(found[name], x.to(found[name].dtype)) for name, x in model.state_dict().items())
    card = (tmp_path / "saved" / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert type(names["tokenizer"]) is RWKV7Tokenizer
    shown = names["tokenizer"].decode(names["ids"]["input_ids"][0])
    assert shown == "System: Be brief.\n\nUser: What is rain?\n\nAssistant:"
    assert names["answer"].shape[1] - names["ids"]["input_ids"].shape[1] in range(1, 4)


def test_a_missing_vocabulary_names_the_extra(monkeypatch):
    monkeypatch.setattr(tokenizers, "PACKAGES", ("no_such_package",))
    with pytest.raises(
        MissingExtraError, match=r"vocabulary of RWKV World models .* is in no installed package.*\[rwkv\]"
    ):
        RWKV7Tokenizer()


def test_a_vocabulary_that_is_none(tmp_path):
    (tmp_path / "words.txt").write_text("hello\n")
    with pytest.raises(ModelError, match=r"words.txt is no vocabulary of RWKV .*it has lines like: 258 ' the' 4"):
        RWKV7Tokenizer(str(tmp_path / "words.txt"))
