"""The perplexity reward equals the model's own cross entropy, in pieces, for many architectures."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from eggroll.errors import ConfigError, DataError, RewardError
from eggroll.llm.data.examples import Example
from eggroll.llm.rewards import PerplexityReward
from eggroll.llm.rewards.logits import chunked_logits
from eggroll.torch import Population

CAUSAL = ["llama", "gpt2", "gemma2", "cohere", "granite", "mixtral", "mamba"]
ENCODER_DECODER = ["t5", "bart"]
ONE_STEP = 1  # a budget of one byte: one time step at once


def random_batch(rows=3, time=11, seed=1):
    """Ids, and a mask with padding on the right."""
    ids = torch.randint(0, 300, (rows, time), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[1, 9:] = 0
    return ids, mask


def plain_log_likelihood(model, ids, mask, labels):
    """Row by row, from the logits that the model gives all at once."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(targets.shape).sum(1) / (targets != -100).sum(1)


@pytest.mark.parametrize("budget", [ONE_STEP, 3 * 3 * 300 * 16, 2**28])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causal_models_in_float64(build_model, tiny_tokenizer, name, budget):
    model = build_model(name, torch.float64)
    ids, mask = random_batch()
    found = PerplexityReward(tiny_tokenizer, logits_budget=budget).log_likelihood(model, ids, mask)
    expected = plain_log_likelihood(model, ids, mask, ids.masked_fill(mask == 0, -100))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL + ENCODER_DECODER)
@torch.no_grad()
def test_equals_the_models_own_loss_in_float32(build_model, tiny_tokenizer, name):
    model = build_model(name)
    ids, mask = random_batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    reward = PerplexityReward(tiny_tokenizer, logits_budget=ONE_STEP)
    for row in range(len(ids)):
        inputs = {"input_ids": ids[[row]], "attention_mask": mask[[row]], "labels": labels[[row]]}
        found = reward.log_likelihood(model, inputs)
        torch.testing.assert_close(found[0], -model(**inputs).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ENCODER_DECODER)
@torch.no_grad()
def test_encoder_decoder_in_float64(build_model, tiny_tokenizer, name):
    model = build_model(name, torch.float64)
    ids, mask = random_batch()
    labels = torch.randint(0, 300, (3, 5))
    labels[2, 3:] = -100
    logits = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view(3, 5)
    expected = -losses.sum(1) / (labels != -100).sum(1)
    for budget in (ONE_STEP, 2**28):
        found = PerplexityReward(tiny_tokenizer, logits_budget=budget).log_likelihood(model, ids, mask, labels)
        torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER_DECODER])
@torch.no_grad()
def test_logits_never_exceed_the_budget(build_model, name):
    model = build_model(name)
    ids, mask = random_batch()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in ENCODER_DECODER:
        inputs["decoder_input_ids"] = ids
    whole = model(**inputs).logits
    pieces = list(chunked_logits(model, inputs, 3 * 4 * 300 * 8))
    assert [start for start, _ in pieces] == [0, 4, 8]
    torch.testing.assert_close(torch.cat([piece for _, piece in pieces], 1), whole)
    assert "forward" not in model.base_model.__dict__


@torch.no_grad()
def test_the_body_runs_once(tiny_model, tiny_tokenizer):
    calls = []
    tiny_model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    ids, mask = random_batch()
    PerplexityReward(tiny_tokenizer, logits_budget=ONE_STEP).log_likelihood(tiny_model, ids, mask)
    assert len(calls) == 1


@torch.no_grad()
def test_an_error_in_the_head_leaves_the_model_as_it_was(tiny_model, tiny_tokenizer):
    def fail(*_):
        raise RuntimeError("stop")

    handle = tiny_model.lm_head.register_forward_pre_hook(fail)
    ids, mask = random_batch()
    reward = PerplexityReward(tiny_tokenizer)
    with pytest.raises(RuntimeError, match="stop"):
        reward.log_likelihood(tiny_model, ids, mask)
    handle.remove()
    assert "forward" not in tiny_model.model.__dict__
    expected = plain_log_likelihood(tiny_model, ids, mask, ids.masked_fill(mask == 0, -100))
    torch.testing.assert_close(reward.log_likelihood(tiny_model, ids, mask), expected)


class HeadOnly(torch.nn.Module):
    """A model whose body is not a module of its own."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, input_ids, attention_mask=None, **_):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@torch.no_grad()
def test_model_without_a_separate_head_falls_back(tiny_model, tiny_tokenizer):
    ids, mask = random_batch()
    reward = PerplexityReward(tiny_tokenizer)
    torch.testing.assert_close(
        reward.log_likelihood(HeadOnly(tiny_model), ids, mask), reward.log_likelihood(tiny_model, ids, mask)
    )


@torch.no_grad()
def test_padding_on_the_left_scores_the_same(tiny_model, tiny_tokenizer):
    ids = torch.randint(0, 300, (1, 6))
    padded = torch.cat([torch.full((1, 4), 5), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 6])
    reward = PerplexityReward(tiny_tokenizer)
    alone = reward.log_likelihood(tiny_model, ids)
    torch.testing.assert_close(reward.log_likelihood(tiny_model, padded, mask), alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_further_inputs_of_a_data_loader_are_passed_on(build_model, tiny_tokenizer):
    model = build_model("gpt2")
    ids, mask = random_batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.ones_like(ids)}
    reward = PerplexityReward(tiny_tokenizer)
    assert not torch.allclose(reward.log_likelihood(model, inputs), reward.log_likelihood(model, ids, mask))
    assert reward.evaluate(model, inputs) == pytest.approx(reward.log_likelihood(model, inputs).mean().item())
    as_lists = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    assert torch.equal(reward.log_likelihood(model, as_lists), reward.log_likelihood(model, ids, mask))


@torch.no_grad()
def test_row_without_scored_tokens_is_zero(tiny_model, tiny_tokenizer):
    ids, mask = random_batch()
    labels = ids.masked_fill(mask == 0, -100)
    labels[1] = -100
    found = PerplexityReward(tiny_tokenizer).log_likelihood(tiny_model, ids, mask, labels)
    assert found[1] == 0
    assert found[0] < 0


def test_encode_texts_pads_on_the_right(tiny_tokenizer):
    batch = PerplexityReward(tiny_tokenizer, max_length=4).encode(["ab", "abcdef"])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert tiny_tokenizer.decode(batch["input_ids"][1]) == "abcd"
    assert batch["labels"][0, 2:].tolist() == [-100, -100]
    assert torch.equal(batch["labels"][1], batch["input_ids"][1])


def scored(tokenizer, batch, row=0):
    labels = batch["labels"][row]
    return tokenizer.decode(labels[labels != -100])


def test_only_the_completion_is_scored(tiny_tokenizer):
    example = Example("2+2=", None, {"completion": "4"})
    batch = PerplexityReward(tiny_tokenizer).encode([example])
    assert tiny_tokenizer.decode(batch["input_ids"][0]) == "2+2=4<|end|>"
    assert scored(tiny_tokenizer, batch) == "4<|end|>"


def test_long_prompt_loses_its_beginning(tiny_tokenizer):
    example = Example("0123456789", None, {"completion": "4"})
    batch = PerplexityReward(tiny_tokenizer, max_length=5).encode([example])
    assert tiny_tokenizer.decode(batch["input_ids"][0]) == "7894<|end|>"


def test_only_the_assistants_last_turn_is_scored(tiny_tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    reward = PerplexityReward(tiny_tokenizer)
    for example in (
        Example(messages[:1], None, {"messages": messages}),
        Example(messages[:1], None, {"completion": messages[1:]}),
    ):
        batch = reward.encode([example])
        assert tiny_tokenizer.decode(batch["input_ids"][0]) == "<|user|>hi<|end|><|assistant|>hello<|end|>"
        assert scored(tiny_tokenizer, batch) == "hello<|end|>"


def test_encoder_decoder_reads_the_prompt_and_scores_the_completion(tiny_tokenizer):
    examples = [Example("2+2=", None, {"completion": "4"}), Example("10+2=", None, {"completion": "12"})]
    batch = PerplexityReward(tiny_tokenizer).encode(examples, encoder_decoder=True)
    assert tiny_tokenizer.decode(batch["input_ids"][1]) == "10+2="
    assert scored(tiny_tokenizer, batch, 1) == "12<|end|>"
    assert batch["labels"][0].tolist()[-1] == -100


def test_examples_that_cannot_be_scored(tiny_tokenizer, build_model):
    reward = PerplexityReward(tiny_tokenizer)
    conversation = [{"role": "user", "content": "hi"}]
    message = "example 1 has no text to score: its columns are ['n']. Perplexity needs a column 'text', a 'prompt'"
    with pytest.raises(DataError, match=re.escape(message)):
        reward.encode([Example(conversation, None, {"n": 1})])
    with pytest.raises(DataError, match="example 1 has no completion: an encoder-decoder model reads a prompt"):
        reward.encode(["text"], encoder_decoder=True)
    with pytest.raises(RewardError, match="so perplexity needs the answer: give labels"):
        reward.log_likelihood(build_model("t5"), torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=re.escape("max_length (=1) must be at least 2")):
        PerplexityReward(tiny_tokenizer, max_length=1)


@pytest.mark.parametrize("budget", [ONE_STEP, 2**28])
@pytest.mark.parametrize("name", CAUSAL + ENCODER_DECODER)
@torch.no_grad()
def test_whole_population_equals_its_members(build_model, tiny_tokenizer, name, budget):
    model = build_model(name)
    population = Population(model, population_size=4, rank=2, sigma=0.02, seed=3)
    reward = PerplexityReward(tiny_tokenizer, logits_budget=budget)
    ids, mask = random_batch()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    alone = []
    for member in range(4):
        with population.member(0, member):
            alone.append(reward.log_likelihood(model, inputs))
    with population.perturbed(0) as active:
        together = reward.log_likelihood(model, {key: active.expand(x) for key, x in inputs.items()})
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert torch.stack(alone).std(0).min() > 1e-4  # the members do differ


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_no_word_about_parameters_without_a_use(build_model, tiny_tokenizer, name):
    """The body is called by itself, and the model then for the head alone: all parameters have their use."""
    model = build_model(name)
    population = Population(model, population_size=4, kinds=("matrix",))
    ids, mask = random_batch()
    reward = PerplexityReward(tiny_tokenizer, logits_budget=ONE_STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with population.perturbed(0) as active:
            rows = {"input_ids": active.expand(ids), "attention_mask": active.expand(mask)}
            assert active.split(reward.log_likelihood(model, rows["input_ids"], rows["attention_mask"])).shape == (4, 3)
