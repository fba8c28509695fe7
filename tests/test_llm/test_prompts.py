"""What a model reads of a prompt: its token ids, its special tokens, and the side of its padding."""

import json

import pytest
import torch
import transformers
from tiny_models import SIZES, byte_tokenizer
from tokenizers.processors import TemplateProcessing

from eggroll import EggrollConfig, EggrollTrainer, PerplexityReward
from eggroll.errors import ModelError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.generation.encode import Encoded, encode_prompts
from eggroll.llm.models.export import load_line, save_pretrained
from eggroll.llm.models.loading import load, load_skeleton

USER = {"role": "user", "content": "hi"}


def add_special(tokenizer, single):
    """Lets a tokenizer put special tokens around texts, as ``$A <|end|>`` says."""
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in single.split() if token != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=tokens)
    return tokenizer


def read(tokenizer, prompts, **settings):
    found = encode_prompts(tokenizer, prompts, settings.pop("max_length", 512), **settings).input_ids
    return [tokenizer.decode(ids) for ids in found]


class TestSpecialTokens:
    """Special tokens came twice, or where a template had none; prompts ended in an end token."""

    @pytest.mark.parametrize("single", ["$A", "$A <|end|>", "<|start|> $A", "<|start|> $A <|end|>"])
    @pytest.mark.parametrize("start", ["", "{{ bos_token }}"], ids=["bare", "start"])
    def test_conversations_are_those_of_the_template(self, tiny_tokenizer, single, start):
        add_special(tiny_tokenizer, single).chat_template = start + tiny_tokenizer.chat_template
        expected = tiny_tokenizer.apply_chat_template([USER], add_generation_prompt=True).input_ids
        begun = [USER, {"role": "assistant", "content": "Well,"}]
        found = encode_prompts(tiny_tokenizer, ["hi", [USER], begun], 512).input_ids
        assert found[:2] == [expected, expected]
        assert found[2] == tiny_tokenizer.apply_chat_template(begun, continue_final_message=True).input_ids
        text = "<|user|>hi<|end|><|assistant|>"
        assert tiny_tokenizer.decode(expected) == ("<|start|>" if start else "") + text

    def test_texts_follow_the_tokenizer_but_do_not_end(self, tiny_tokenizer):
        for single, expected in {
            "$A": "hi",
            "$A <|end|>": "hi",
            "<|start|> $A <|end|>": "<|start|>hi",
            "<|start|> $A": "<|start|>hi",
            "$A <|user|> <|start|>": "hi<|user|><|start|>",
        }.items():
            add_special(tiny_tokenizer, single)
            assert read(tiny_tokenizer, ["hi"], chat=False) == [expected], single
        add_special(tiny_tokenizer, "<|start|> $A <|end|>")
        assert read(tiny_tokenizer, ["hi"], chat=False, system="be brief") == ["<|start|>be brief\n\nhi"]
        assert read(tiny_tokenizer, ["hi"], chat=False, encoder=True) == ["<|start|>hi<|end|>"]

    def test_other_end_tokens(self, tiny_tokenizer):
        add_special(tiny_tokenizer, "<|user|> $A <|assistant|>")
        assert read(tiny_tokenizer, ["hi"], chat=False) == ["<|user|>hi<|assistant|>"]
        ends = [tiny_tokenizer.convert_tokens_to_ids("<|assistant|>")]
        assert read(tiny_tokenizer, ["hi"], chat=False, ends=ends) == ["<|user|>hi"]
        tiny_tokenizer.sep_token = "<|assistant|>"
        assert read(tiny_tokenizer, ["hi"], chat=False) == ["<|user|>hi"]

    def test_what_a_text_says_itself_stays(self, tiny_tokenizer):
        add_special(tiny_tokenizer, "$A <|end|>")
        assert read(tiny_tokenizer, ["a<|end|>b", "a<|end|>"], chat=False) == ["a<|end|>b", "a<|end|>"]
        tiny_tokenizer.bos_token = "<|end|>"  # GPT-2: one token begins and ends
        add_special(tiny_tokenizer, "<|end|> $A")
        assert read(tiny_tokenizer, ["a", ""], chat=False) == ["<|end|>a", "<|end|>"]

    def test_long_prompts_keep_what_stands_around_them(self, tiny_tokenizer):
        add_special(tiny_tokenizer, "<|start|> $A <|end|>")
        with pytest.warns(UserWarning, match=r"more than max_length \(=5\) tokens lose their beginning"):
            assert read(tiny_tokenizer, ["abcdefgh"], chat=False, max_length=5) == ["<|start|>efgh"]
        with pytest.warns(UserWarning, match="lose their beginning"):
            assert read(tiny_tokenizer, ["abcdefgh"], chat=False, max_length=5, encoder=True) == ["<|start|>fgh<|end|>"]
        tiny_tokenizer.chat_template = "{{ bos_token }}" + tiny_tokenizer.chat_template
        with pytest.warns(UserWarning, match="lose their beginning"):
            assert read(tiny_tokenizer, [[USER]], max_length=4) == ["<|start|>i<|end|><|assistant|>"]

    def test_likelihood_reads_the_same(self, tiny_tokenizer):
        add_special(tiny_tokenizer, "<|start|> $A <|end|>")
        rows = [
            {"prompt": "hi", "completion": "sun"},
            {"messages": [USER, {"role": "assistant", "content": "sun"}]},
        ]
        reward = PerplexityReward(tiny_tokenizer)
        batch = reward.encode(load_examples(rows))
        texts = [
            tiny_tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert texts == ["<|start|>hisun<|end|>", "<|user|>hi<|end|><|assistant|>sun<|end|>"]
        apart = reward.encode(load_examples(rows[:1]), encoder_decoder=True)
        assert tiny_tokenizer.decode(apart["input_ids"][0]) == "<|start|>hi<|end|>"

    def test_every_backend_reads_the_same(self, tiny_model, tiny_tokenizer, monkeypatch):
        """vLLM is not there; what its evaluator hands to the engine is."""
        from eggroll.llm.backends import vllm
        from eggroll.llm.rewards.load import as_reward

        add_special(tiny_tokenizer, "<|start|> $A <|end|>")
        given = []

        class Engine:
            def generate(self, ids, sampling, requests):
                given.extend(ids)
                return []

        config = EggrollConfig(population_size=2)
        rows = load_examples([{"prompt": [USER]}, {"prompt": "hi"}])
        evaluator = vllm.VllmEvaluator(Engine(), tiny_tokenizer, as_reward(len, tiny_tokenizer), config, [])
        monkeypatch.setattr(vllm.VllmEvaluator, "_sampling", lambda *_: None)
        evaluator.complete(rows, None, 0, range(1))
        trainer = EggrollTrainer(tiny_model, config, len, tiny_tokenizer)
        expected = tiny_tokenizer.apply_chat_template([USER], add_generation_prompt=True).input_ids
        assert given == trainer.worker.evaluator.encode(rows).input_ids == [expected, expected]


def test_padding_on_either_side():
    ids, mask = Encoded([[1, 2, 3], [4]]).padded(9, left=True)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = Encoded([[1, 2, 3], [4]]).padded(9, left=False)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def marian():
    config = transformers.MarianConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=300, max_position_embeddings=64, pad_token_id=299,
        decoder_start_token_id=299, eos_token_id=298,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def mbart():
    config = transformers.MBartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=300, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.MBartForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["bart", "t5", "marian", "mbart"])
def test_encoders_are_padded_on_the_right(build_model, tiny_tokenizer, name):
    """With learned positions, a short prompt's answer changed when a longer one was in the batch."""
    model = _random({"marian": marian, "mbart": mbart}[name]()) if name in ("marian", "mbart") else build_model(name)
    config = EggrollConfig(population_size=2, max_tokens=6, chat=False, members_per_forward=2)
    trainer = EggrollTrainer(model, config, len, tiny_tokenizer)
    evaluator = trainer.worker.evaluator
    rows = load_examples(["ab", "a much longer prompt than the other one"])
    alone, _ = evaluator.complete(rows[:1], None, 0, range(1))
    together, _ = evaluator.complete(rows, None, 0, range(1))
    assert together[0] == alone[0]
    inputs = tiny_tokenizer("ab", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)[0, 1:].tolist()
    until = next((at for at, token in enumerate(made) if token in evaluator.eos_ids), 6)
    assert alone[0] == tiny_tokenizer.decode(made[:until], skip_special_tokens=True)
    assert until > 1


def _random(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "marian"])
def test_the_line_that_loads_it(build_model, tiny_tokenizer, tmp_path, name):
    model = marian() if name == "marian" else build_model(name)
    saved = save_pretrained(model, tiny_tokenizer, tmp_path / "out", metadata={})
    auto = "AutoModelForCausalLM" if name == "llama" else "AutoModelForSeq2SeqLM"
    assert load_line(saved) == f'{auto}.from_pretrained("{saved}")'
    assert type(getattr(transformers, auto).from_pretrained(saved)) is type(model)
    (saved / "eggroll.json").unlink()  # one that was saved by something else
    assert load_line(saved) == f'{auto}.from_pretrained("{saved}")'


def test_the_line_that_loads_other_classes(tiny_tokenizer, tmp_path):
    config = transformers.BartConfig(
        d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=300
    )
    decoder = transformers.BartForCausalLM(config)  # its configuration says encoder-decoder all the same
    saved = save_pretrained(decoder, tiny_tokenizer, tmp_path / "decoder", metadata={})
    assert load_line(saved).startswith("AutoModelForCausalLM.")
    sizes = {**SIZES, "num_key_value_heads": 2}
    classifier = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    saved = save_pretrained(classifier, None, tmp_path / "classifier", metadata={})
    assert load_line(saved).startswith("LlamaForSequenceClassification.")
    (saved / "eggroll.json").write_text(json.dumps({"auto_class": "os; evil"}))
    assert load_line(saved).startswith("AutoModelForCausalLM.")


class TestTokensBeyondTheEmbedding:
    """Added to the tokenizer, not to the model: an IndexError."""

    @staticmethod
    def small(tokenizer, rows):
        sizes = {**SIZES, "vocab_size": rows, "num_key_value_heads": 2}
        return _random(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)))

    @pytest.mark.parametrize("rows", [256, 257])
    def test_pad_token(self, rows):
        tokenizer = byte_tokenizer(eos_token="!", bos_token="!")
        assert tokenizer.pad_token_id >= 256
        tokenizer.pad_token = "<|assistant|>"
        model = self.small(tokenizer, rows)
        config = EggrollConfig(population_size=2, max_tokens=3)
        trainer = EggrollTrainer(model, config, len, tokenizer)
        assert tokenizer.pad_token == "!"
        rows = load_examples(["a", "a longer one"])
        together, _ = trainer.worker.evaluator.complete(rows, None, 0, range(1))
        alone, _ = trainer.worker.evaluator.complete(rows[:1], None, 0, range(1))
        assert together[0] == alone[0]

    def test_pad_token_of_the_configuration(self, tiny_tokenizer, tmp_path):
        tiny_tokenizer.save_pretrained(tmp_path)
        self.small(tiny_tokenizer, 262).save_pretrained(tmp_path)
        about = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**about, "pad_token_id": 262}))
        loaded = load(str(tmp_path), dtype="float32")
        assert "pad_token_id 262 of the model's configuration is left out: its embedding has 262 rows" in loaded.notes
        assert loaded.model.config.pad_token_id is None
        assert load_skeleton(str(tmp_path)).model.config.pad_token_id is None
        assert loaded.tokenizer.pad_token == "<|pad|>"

    def test_neither_pad_nor_end(self):
        tokenizer = byte_tokenizer()
        EggrollTrainer(self.small(tokenizer, 256), EggrollConfig(population_size=2), len, tokenizer)
        assert tokenizer.pad_token_id == 0

    def test_tokens_of_prompts(self, tiny_tokenizer):
        model = self.small(tiny_tokenizer, 256)
        message = (
            r"the tokenizer gives token (25\d|26\d) \('<\|(user|assistant|end)\|>'\), but the model's embedding has "
            r"256 rows \(0 to 255\)\. Use the model's own tokenizer, or add rows"
        )
        for reward in (len, PerplexityReward(tiny_tokenizer)):
            trainer = EggrollTrainer(model, EggrollConfig(population_size=2, generations=1), reward, tiny_tokenizer)
            with pytest.raises(ModelError, match=message):
                trainer.evolve([{"messages": [USER, {"role": "assistant", "content": "sun"}]}])
