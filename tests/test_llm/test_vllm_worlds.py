"""Conversations on vLLM, with a stand-in for the engine: which adapter says what, and how its tokens are chosen."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from eggroll.llm import EggrollConfig, Turn, World, WorldReward
from eggroll.llm.backends.vllm import VllmEvaluator
from eggroll.llm.data.examples import load_examples


class Talk(World):
    def reset(self, row):
        self.left = row["turns"]
        return "Go."

    def step(self, completion):
        self.left -= 1
        return Turn("On.", done=self.left == 0, score=float(len(completion)))


class Engine:
    """Says the letter of the adapter, once more in each turn, and ends."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, []

    def prepare(self, generation):
        self.generation = generation

    def request(self, generation, member, sigma):
        return "abcd"[member]

    def generate(self, prompts, sampling, requests):
        self.calls.append(([self.tokenizer.decode(ids) for ids in prompts], sampling, requests))
        letters = requests or ["z"] * len(prompts)
        texts = [letter * len(self.calls) for letter in letters]
        ends = [self.tokenizer.eos_token_id]
        made = [self.tokenizer(text, add_special_tokens=False).input_ids + ends for text in texts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)]) for tokens in made]


@pytest.fixture
def evaluator(tiny_tokenizer, monkeypatch):
    stand_in = ModuleType("vllm")
    stand_in.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    config = EggrollConfig(population_size=4, rank=1, temperature=1.0, max_tokens=4)
    return VllmEvaluator(
        Engine(tiny_tokenizer), tiny_tokenizer, WorldReward(Talk), config, [tiny_tokenizer.eos_token_id]
    )


def test_members_hold_conversations_with_their_adapters(evaluator):
    batch = load_examples([{"turns": 1}, {"turns": 2}], purpose="worlds")
    found = evaluator.evaluate(0, 0.1, batch, range(4))
    np.testing.assert_array_equal(found.fitness, [[1.0, 2.0]] * 4)
    (first, sampling, adapters), (second, later, left) = evaluator.engine.calls
    assert adapters == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert left == ["a", "b", "c", "d"], "conversations that are over are not asked for again"
    assert first == ["<|user|>Go.<|end|><|assistant|>"] * 8
    assert second[1] == "<|user|>Go.<|end|><|assistant|>b<|end|><|user|>On.<|end|><|assistant|>"
    seeds = [one.seed for one in (*sampling, *later)]
    assert len(set(seeds)) == len(seeds)
    assert all(one.n == 1 for one in sampling)
    assert found.tokens == 8 + 2 * 4


def test_the_center_has_no_adapter(evaluator):
    found = evaluator.heldout(load_examples([{"turns": 2}], purpose="worlds"))
    assert [call[2] for call in evaluator.engine.calls] == [None, None]
    assert [m["content"] for m in found.samples[0]["completion"]] == ["z", "On.", "zz", "On."]
