"""Run by test_estimate.py in a process of its own: counted and measured bytes of some runs, as JSON.

What is measured is the growth of the largest resident memory over what the process had before it made the model.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

import eggroll.llm.backends.torch as hf
from eggroll.core.records import UpdateRecord
from eggroll.llm.backends.torch import TorchEvaluator, replica_for
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example
from eggroll.llm.estimate.memory import Estimate, Workload
from eggroll.llm.generation.generate import Sampling
from eggroll.llm.models.outline import Outline
from eggroll.llm.rewards.load import as_reward
from eggroll.llm.rewards.perplexity import PerplexityReward
from eggroll.llm.rwkv7.config import RWKV7Config
from eggroll.llm.rwkv7.files import register

END = 2
MODELS = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16384,
        tie_word_embeddings=True,
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=512, n_layer=6, n_head=8, vocab_size=16384),
    "tiny": lambda: transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=16384
    ),
    "rwkv7": lambda: RWKV7Config(hidden_size=512, num_hidden_layers=5, vocab_size=4096),
}
register()


class Tokenizer:
    """Gives every text ``len(text)`` tokens."""

    pad_token_id, eos_token_id, chat_template = 0, END, None

    def __call__(self, texts, return_tensors=None, **_):
        if return_tensors is None:
            return transformers.BatchEncoding({"input_ids": [[1] * len(text) for text in texts]})
        longest = max(map(len, texts))
        ids = torch.ones(len(texts), longest, dtype=torch.long)
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def batch_decode(self, rows, **_):
        return ["x" * len(row) for row in rows]


class Ending(Sampling):
    """Greedy, but one row in four ends at once and the others never do."""

    @classmethod
    def for_rows(cls, *_):
        return cls()

    def choose(self, logits_RV, step, rows):
        super().choose(logits_RV, step, rows)
        return torch.where(rows % 4 == 0, END, END + 1)


def resident(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def forget_peak():
    """Let VmHWM start again from what is resident now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS:")


class Run:
    def __init__(self, model, dtype, settings, rows, prompt):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(MODELS[model](), dtype=getattr(torch, dtype))
        scored = prompt is None
        self.model = made.requires_grad_(False).eval()
        self.config = EggrollConfig(**settings)
        self.replica = replica_for(self.model, self.config)
        tokenizer = Tokenizer()
        reward = PerplexityReward(tokenizer) if scored else as_reward(lambda text: float(len(text)), tokenizer)
        self.evaluator = TorchEvaluator(self.replica.population, tokenizer, reward, self.config)
        self.replica.population.mode = "rows"
        if scored:
            ids = torch.ones(rows, self.config.max_length, dtype=torch.long)
            self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            self.workload = Workload(rows, self.config.max_length)
        else:
            self.batch = [Example("a" * (prompt - index % 3)) for index in range(rows)]
            self.workload = Workload(rows, prompt, self.config.max_tokens)

    def evaluate(self, generation):
        self.evaluator.evaluate(generation, 0.01, self.batch)

    def update(self, generation):
        size = self.config.population_size
        self.replica.apply(UpdateRecord.make(generation, 0.01, 0.001, np.linspace(-0.5, 0.5, size)))


def measure(model, dtype, settings, rows, prompt=None, ending=False):
    """Bytes of one run, counted and measured, in its evaluation and its update. Without a prompt, texts are scored."""
    hf.Sampling = Ending if ending else Sampling
    before = forget_peak()
    run = Run(model, dtype, settings, rows, prompt)
    run.evaluate(0)
    run.update(0)  # makes the optimizer's state
    forget_peak()
    run.evaluate(1)
    evaluated = resident("VmHWM:")
    forget_peak()
    run.update(1)
    updated = resident("VmHWM:")
    estimate = Estimate.of(Outline.of(run.model), run.config, run.model.dtype)
    memory = estimate.memory(run.workload)
    fixed = sum(memory.fixed.values())
    moments = {moment.name: fixed + moment.total for moment in memory.moments}
    update = moments.pop("updating")
    if not ending:
        moments.pop("writing on after some have ended", None)
    return {
        "evaluation": {"counted": max(moments.values()), "measured": evaluated - before},
        "update": {"counted": update, "measured": updated - before},
        "details": {**memory.fixed, **moments, "members": memory.members},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for name, case in json.loads(sys.argv[1]).items():
        # A small model first: what the libraries keep for themselves once they have been used is not counted.
        measure(**{**case, "model": "tiny", "settings": {**case["settings"], "max_tokens": 2}})
        results[name] = measure(**case)
    print(json.dumps(results))
