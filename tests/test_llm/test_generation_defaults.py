"""A model's generation config: what is applied, what is overridden by name, the same for every way of generating."""

import sys
import types

import pytest
import transformers

from eggroll import EggrollConfig, EggrollTrainer, PerplexityReward
from eggroll.errors import ModelError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.generation.defaults import APPLIED, GenerationDefaults

PROMPTS = ["ab", "a much longer prompt, longer than the other one"]
VALUES = {
    "sequence_bias": [[[5], 20.0], [[7, 9], 15.0]],
    "encoder_repetition_penalty": 2.5,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[97], [98, 99]],
    "min_length": 10,
    "min_new_tokens": 8,
    "forced_bos_token_id": 65,
    "forced_eos_token_id": 66,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.9),
    "suppress_tokens": list(range(0, 300, 2)),
    "begin_suppress_tokens": list(range(0, 300, 3)),
}


def completions(model, tokenizer, prompts, **settings):
    """What the center writes, and by transformers alone, prompt by prompt, ended by every seventh token."""
    config = EggrollConfig(population_size=2, max_tokens=12, chat=False, **settings)
    evaluator = EggrollTrainer(model, config, len, tokenizer).worker.evaluator
    evaluator.eos_ids = ends = list(range(0, 300, 7))
    made, _ = evaluator.complete(load_examples(prompts), None, 0, range(1))
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = 1 if model.config.is_encoder_decoder else inputs.input_ids.shape[1]
        out = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, num_beams=1, num_return_sequences=1, eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )[0, start:].tolist()  # fmt: skip
        until = next((at for at, token in enumerate(out) if token in ends), len(out))
        expected.append(tokenizer.decode(out[:until], skip_special_tokens=True))
    return made, expected


@pytest.mark.parametrize("setting", APPLIED)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_applied_as_transformers_does_to_each_prompt_alone(build_model, tiny_tokenizer, name, setting):
    """In a batch with padding: a decoder that this package decodes with, and one that goes through ``generate``."""
    model = build_model(name)
    setattr(model.generation_config, setting, VALUES[setting])
    made, expected = completions(model, tiny_tokenizer, PROMPTS)
    assert made == expected


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_all_at_once_change_the_text(build_model, tiny_tokenizer, name):
    plain, _ = completions(build_model(name), tiny_tokenizer, PROMPTS)
    model = build_model(name)
    for setting in ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "suppress_tokens"):
        setattr(model.generation_config, setting, VALUES[setting])
    made, expected = completions(model, tiny_tokenizer, PROMPTS)
    assert made == expected
    assert made != plain


def test_members_and_rows_that_end_early(build_model, tiny_tokenizer):
    """Rows are cut out on the way; the others keep their own processors."""
    prompts = ["a", "bc", "a much longer prompt", "bd"]
    model = build_model("llama")
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.encoder_no_repeat_ngram_size = 1
    config = EggrollConfig(population_size=4, max_tokens=12, chat=False, sigma=0.1, members_per_forward=4)
    evaluator = EggrollTrainer(model, config, len, tiny_tokenizer).worker.evaluator
    evaluator.eos_ids = list(range(0, 300, 3))
    batch = load_examples(prompts)
    evaluator.prepare(0)
    with evaluator.perturbed(0, range(4), 0.1) as active:
        together, _ = evaluator.complete(batch, active, 0, range(4))
    alone = []
    for member in range(4):
        with evaluator.perturbed(0, range(member, member + 1), 0.1) as active:
            for row in batch:
                alone += evaluator.complete([row], active, 0, range(member, member + 1))[0]
    assert together == alone
    assert len({len(text) for text in together}) > 1


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_sampled_tokens_do_not_depend_on_the_batch(build_model, tiny_tokenizer, name):
    model = build_model(name)
    plain, _ = completions(model, tiny_tokenizer, PROMPTS, temperature=1.0)
    model.generation_config.suppress_tokens = list(range(0, 256, 2))
    made, _ = completions(model, tiny_tokenizer, PROMPTS, temperature=1.0)
    assert made != plain
    allowed = set(range(1, 256, 2))
    assert {token for text in made for token in tiny_tokenizer(text).input_ids} <= allowed | set(range(256, 300))


OVERRIDDEN = {
    "num_return_sequences": 4, "num_beams": 4, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9,
    "max_length": 2048, "stop_strings": ["x"], "return_dict_in_generate": True, "output_scores": True,
    "prompt_lookup_num_tokens": 3, "length_penalty": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "mamba", "t5"])
def test_what_contradicts_our_settings_is_overridden_by_name(build_model, tiny_tokenizer, name):
    plain, _ = completions(build_model(name), tiny_tokenizer, PROMPTS)
    model = build_model(name)
    own = model.generation_config
    for setting, value in OVERRIDDEN.items():
        setattr(own, setting, value)
    before = own.to_dict()
    config = EggrollConfig(population_size=2, max_tokens=12, chat=False, generations=1)
    trainer = EggrollTrainer(model, config, len, tiny_tokenizer)
    trainer.worker.evaluator.eos_ids = list(range(0, 300, 7))
    made, _ = trainer.worker.evaluator.complete(load_examples(PROMPTS), None, 0, range(1))
    assert made == plain
    assert model.generation_config is own
    assert own.to_dict() == before
    (note,) = trainer.worker.setup.generation
    assert note == (
        'the model\'s generation config: max_length=2048, stop_strings=["x"], do_sample=true, num_beams=4, '
        "temperature=0.6, top_k=20, top_p=0.9, length_penalty=2.0, num_return_sequences=4 are not used "
        "(temperature, max_tokens and samples_per_prompt count instead)"
    )
    with pytest.warns(UserWarning, match="do_sample=true"):
        trainer.evolve(PROMPTS)


def notes(ours=0.0, /, **settings):
    return GenerationDefaults.of(transformers.GenerationConfig(**settings), ours).notes()


def test_the_line():
    assert notes() == []
    assert GenerationDefaults.of(None).notes() == []
    assert notes(repetition_penalty=1.0, num_beams=1, do_sample=False, top_k=50, min_length=0, use_cache=False) == []
    assert notes(repetition_penalty=1.1) == ["the model's generation config: repetition_penalty=1.1 is applied"]
    (line,) = notes(suppress_tokens=list(range(90)), min_new_tokens=2)
    assert line.endswith("min_new_tokens=2, suppress_tokens=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11... are applied")
    assert notes(do_sample=True, temperature=0.7)[0].startswith(
        "the model's generation config: do_sample=true, temperature=0.7 are not used ("
    )
    assert notes(0.7, do_sample=True, temperature=0.7) == []
    assert "top_p=0.8 is not used" in notes(0.7, do_sample=True, temperature=0.7, top_p=0.8)[0]


def test_likelihoods_generate_nothing(build_model, tiny_tokenizer):
    model = build_model("llama")
    model.generation_config.do_sample = True
    trainer = EggrollTrainer(model, EggrollConfig(population_size=2), PerplexityReward(tiny_tokenizer), tiny_tokenizer)
    assert trainer.worker.setup.generation == ()


def test_a_setting_that_cannot_be_applied(build_model, tiny_tokenizer):
    model = build_model("llama")
    model.generation_config.repetition_penalty = -1.0
    with pytest.raises(ModelError, match=r"generation config has repetition_penalty=-1\.0, which cannot be applied"):
        EggrollTrainer(model, EggrollConfig(population_size=2), len, tiny_tokenizer)


def test_vllm(tiny_tokenizer, monkeypatch):
    from eggroll.llm.backends.vllm import VllmEvaluator
    from eggroll.llm.rewards.load import as_reward

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(SamplingParams=dict))
    own = transformers.GenerationConfig(repetition_penalty=1.2, min_new_tokens=3, no_repeat_ngram_size=2, top_p=0.5)
    defaults = GenerationDefaults.of(own)
    config = EggrollConfig(population_size=2)
    evaluator = VllmEvaluator(None, tiny_tokenizer, as_reward(len, tiny_tokenizer), config, [], defaults)
    given = evaluator._sampling(0, 0)
    assert given["repetition_penalty"] == 1.2
    assert given["min_tokens"] == 3
    assert given["temperature"] == 0.0
    assert "top_p" not in given
    assert defaults.notes(vllm=True) == [
        "the model's generation config: repetition_penalty=1.2, min_new_tokens=3 are applied; no_repeat_ngram_size=2 "
        "is not applied, since vLLM has nothing like it"
    ]
