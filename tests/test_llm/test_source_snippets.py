"""The snippets and command lines of the library whose names we keep, as they stand there, on tiny models.

Only the models' names are replaced. What a snippet takes for granted (``dataloader``, ``run_tests``, ``code_scorer``,
``score.py``) is made here; the length of the longest command lines is cut by flags at their end.
"""

import importlib
import shlex

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.cli.main import main

PYTHON_API = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from eggroll import EggrollTrainer, EggrollConfig, PerplexityReward

model = AutoModelForCausalLM.from_pretrained("gpt2")
tokenizer = AutoTokenizer.from_pretrained("gpt2")

config = EggrollConfig(
    population_size=64,   # mutations per generation
    rank=8,               # low-rank perturbation rank
    sigma=0.01,           # noise magnitude
    lr=0.001,             # learning rate
    generations=100,      # evolution steps
    target_modules=["c_attn", "c_proj"],  # only evolve these layers
)

reward = PerplexityReward(tokenizer)
trainer = EggrollTrainer(model, config, reward, tokenizer)
trainer.evolve(dataloader)
trainer.save("./evolved-model")
"""
CUSTOM_REWARDS = """
from eggroll import EggrollTrainer, EggrollConfig, TextReward, CustomReward

# Score generated text (non-differentiable!)
def my_scorer(text: str) -> float:
    if "correct answer" in text:
        return 1.0
    return 0.0

reward = TextReward(tokenizer, scorer=my_scorer)

# Or use any function of (model, inputs) -> float
reward = CustomReward(lambda model, inputs: run_tests(model, inputs))

# Combine multiple rewards
from eggroll import MultiReward
reward = MultiReward([
    (PerplexityReward(tokenizer), 0.3),
    (TextReward(tokenizer, code_scorer), 0.7),
])
"""
REWARD_FILE_1 = """
# Option 1: Score generated text
def score(text: str) -> float:
    return 1.0 if "correct" in text else 0.0
"""
REWARD_FILE_2 = """
# Option 2: Full model access
def reward_fn(model, inputs) -> float:
    output = model(**inputs)
    return -output.loss.item()
"""
COMMANDS = {
    "perplexity": "eggroll tune gpt2 --reward perplexity --generations 50",
    "reward file": """eggroll tune meta-llama/Llama-3.1-8B \\
      --reward score.py \\
      --target-modules q_proj v_proj \\
      --population 128 \\
      --rank 8""",
    "lambda": """eggroll tune gpt2 --reward "lambda text: 1.0 if 'yes' in text else 0.0" """,
    "full model access": "eggroll tune gpt2 --reward my_reward.py",
    "info": "eggroll info meta-llama/Llama-3.1-8B",
}
SHORTER = {
    "perplexity": "-p 8",
    "reward file": "--generations 1 --max-tokens 2 --batch-size 1",
    "lambda": "--generations 1 -p 4 --max-tokens 2 --batch-size 1",
    "full model access": "--generations 2 -p 4",
    "info": "",
}


@pytest.fixture
def places(tmp_path, monkeypatch, tiny_tokenizer, build_model):
    """A folder to work in with the models that the names stand for."""
    monkeypatch.chdir(tmp_path)
    ends = {"bos_token_id": tiny_tokenizer.bos_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    for name, folder in (("gpt2", "tiny-gpt2"), ("llama", "tiny-llama")):
        model = build_model(name)
        for config in (model.config, model.generation_config):
            config.update(ends)
        model.save_pretrained(tmp_path / folder)
        tiny_tokenizer.save_pretrained(tmp_path / folder)
    (tmp_path / "wikitext.txt").write_text(
        "\n\n".join(f"The {n}th line of an encyclopedia , with spaces ." for n in range(9))
    )
    monkeypatch.setattr(importlib.import_module("eggroll.llm.kind"), "DEFAULT_DATASET", "wikitext.txt")
    return tmp_path


def tiny(text):
    """Other models for the names, nothing else."""
    return (
        text.replace('"gpt2"', '"tiny-gpt2"')
        .replace(" gpt2", " tiny-gpt2")
        .replace("meta-llama/Llama-3.1-8B", "tiny-llama")
    )


def batches_of(tokenizer):
    rows = [f"the cat sat on mat {number}" for number in range(10, 18)]
    encoded = tokenizer(rows, return_tensors="pt", padding=True)
    return DataLoader(
        [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)], batch_size=4
    )


def test_python_api(places, tiny_tokenizer):
    """As written: 100 generations on tokenized batches; the model likes its texts better."""
    dataloader = batches_of(tiny_tokenizer)
    before = {}
    base = transformers.AutoModelForCausalLM.from_pretrained("tiny-gpt2")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    names = {"dataloader": dataloader}
    exec(tiny(PYTHON_API), names)
    history = names["trainer"].history
    assert len(history) == 100
    assert history[-1]["fitness_mean"] > history[0]["fitness_mean"]
    saved = transformers.AutoModelForCausalLM.from_pretrained("./evolved-model")
    tokenizer = transformers.AutoTokenizer.from_pretrained("./evolved-model")
    batch = tokenizer(["the cat sat on mat 12"], return_tensors="pt")
    with torch.no_grad():
        losses = [float(model(**batch, labels=batch.input_ids).loss) for model in (base.eval(), saved.eval())]
    assert losses[1] < losses[0]
    changed = {name for name, parameter in saved.named_parameters() if not parameter.equal(before[name])}
    assert changed
    assert all("c_attn" in name or "c_proj" in name for name in changed)


def test_custom_rewards(places, tiny_tokenizer):
    """Each of the three rewards is made as written, and then evolves a model for two generations."""
    calls = []

    def run_tests(model, inputs):
        calls.append(sorted(inputs))
        return float(model(**inputs).logits.mean())

    names = {"tokenizer": tiny_tokenizer, "run_tests": run_tests, "code_scorer": lambda text: float(len(text))}
    names["PerplexityReward"] = importlib.import_module("eggroll").PerplexityReward
    parts = CUSTOM_REWARDS.split("\n# ")
    assert len(parts) == 4
    config = EggrollConfig(population_size=4, rank=1, generations=2, max_tokens=4)
    made = []
    for part in parts:
        exec(part.replace("Score", "# Score", 1) if part.startswith("Score") else _comment(part), names)
        if "reward" not in names:
            continue
        made.append(type(names["reward"]).__name__)
        model = transformers.AutoModelForCausalLM.from_pretrained("tiny-gpt2")
        trainer = EggrollTrainer(model, config, names["reward"], tiny_tokenizer)
        history = trainer.evolve(batches_of(tiny_tokenizer))
        assert [line["generation"] for line in history] == [1, 2]
    assert made == ["TextReward", "CustomReward", "MultiReward"]
    assert calls == [["attention_mask", "input_ids"]] * 8  # 2 generations of 4 members, one at a time


def _comment(part):
    return part if part.startswith(("\n", "from")) else f"# {part}"


@pytest.mark.parametrize("case", COMMANDS)
def test_command_lines(places, capsys, case):
    (places / "score.py").write_text(REWARD_FILE_1)
    (places / "my_reward.py").write_text(REWARD_FILE_2)
    words = shlex.split(tiny(COMMANDS[case]).replace("\\\n", " ")) + shlex.split(SHORTER[case])
    assert words[0] == "eggroll"
    assert main(words[1:]) == 0
    out = capsys.readouterr().out
    if case == "info":
        assert "tiny-llama" in out
        assert "parameters" in out
        return
    (run,) = (places / "runs").iterdir()
    transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    said = {"reward file": "evolved in 4 tensors", "full model access": "members are evaluated one at a time"}
    assert said.get(case, "in Python:") in out
    assert ("no --prompts given: the lines of wikitext-2 are the prompts" in out) == (case != "perplexity")
