"""Rewards from a command line: words, files, lambdas, dotted names."""

import math
import sys

import pytest

from eggroll.errors import RewardError
from eggroll.llm.rewards import (
    CustomReward,
    FunctionReward,
    MultiReward,
    PerplexityReward,
    TextReward,
    as_reward,
    load_reward,
)


@pytest.fixture
def load(tmp_path, tiny_tokenizer):
    """``load(source)`` writes a reward file and loads it; ``load(source, ":name")`` one function of it."""

    def load_file(source, suffix="", name="score.py"):
        path = tmp_path / name
        path.write_text(source, encoding="utf-8")
        return load_reward(f"{path}{suffix}", tiny_tokenizer)

    yield load_file
    for name in [name for name in sys.modules if name.startswith("eggroll_reward_")]:
        del sys.modules[name]


def message_of(call):
    with pytest.raises(RewardError) as info:
        call()
    return str(info.value)


def test_perplexity(tiny_tokenizer):
    assert isinstance(load_reward("perplexity", tiny_tokenizer), PerplexityReward)


def test_task(tiny_tokenizer):
    reward = load_reward("one-sentence", tiny_tokenizer)
    assert reward.name == "one_sentence"
    prompt, answer = "What is a violin?", "A violin is a wooden instrument with four strings."
    assert reward.score([prompt, prompt], [answer, "No."], {"answer": [["instrument"]] * 2}) == [1.0, 0.0]


def test_lambdas(tiny_tokenizer):
    reward = load_reward("lambda text: 1.0 if 'yes' in text else 0.0", tiny_tokenizer)
    assert reward.score(["p", "p"], ["yes!", "no"]) == [1.0, 0.0]
    assert reward.name == "lambda text: 1.0 if 'yes' in text else 0.0"
    reward = load_reward("lambda text: len(re.findall('a', text)) + math.pi", tiny_tokenizer)
    assert reward.score(["p"], ["banana"]) == [3 + math.pi]
    reward = load_reward("lambda completions, **columns: [len(c) for c in completions]", tiny_tokenizer)
    assert isinstance(reward, FunctionReward)
    assert isinstance(load_reward("lambda model, inputs: 0.0", tiny_tokenizer), CustomReward)


def test_broken_lambda(tiny_tokenizer):
    message = message_of(lambda: load_reward("lambda text: 1.0 if", tiny_tokenizer))
    assert message.startswith("the reward 'lambda text: 1.0 if' is not a valid lambda: ")
    assert "Write for example \"lambda text: 1.0 if 'yes' in text else 0.0\"" in message


def test_file_with_score(load):
    reward = load("def score(text: str) -> float:\n    return 1.0 if 'correct' in text else 0.0\n")
    assert isinstance(reward, TextReward)
    assert reward.score(["p", "p"], ["correct", ""]) == [1.0, 0.0]


def test_file_with_reward_fn_of_the_model(load):
    reward = load("def reward_fn(model, inputs) -> float:\n    return model + inputs\n")
    assert isinstance(reward, CustomReward)
    assert reward.evaluate(1, 2) == 3.0


def test_file_with_reward_fn_of_outputs(load):
    reward = load("def reward_fn(outputs, prompts):\n    return [len(o) for o in outputs]\n")
    assert reward.score(["p"], ["abc"]) == [3.0]


def test_file_with_trl_reward(load):
    source = (
        "def reward(prompts, completions, answer, **kwargs):\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    assert load(source).score(["p"], ["4"], {"answer": ["4"]}) == [1.0]


@pytest.mark.parametrize("name", ["format_reward", "reward_len", "accuracy_reward_func", "reward_func", "my_reward_fn"])
def test_names_that_count(load, name):
    assert load(f"def {name}(completions, **kwargs):\n    return [1.0]\n").score(["p"], ["x"]) == [1.0]


def test_several_trl_rewards_are_summed_as_in_trl(load):
    source = "def a_reward(completions, **k):\n    return [1.0]\ndef b_reward(completions, **k):\n    return [2.0]\n"
    reward = load(source)
    assert reward.score(["p"], ["x"]) == [3.0]
    assert reward.name == "a_reward+b_reward"
    assert load(source, ":b_reward").score(["p"], ["x"]) == [2.0]


def test_function_named_reward_wins_over_its_parts(load):
    source = (
        "def score(text):\n    return 1.0\n"
        "def a_reward(completions, **k):\n    return [1.0]\n"
        "def reward(completions, **k):\n    return [score(c) + 6.0 for c in completions]\n"
    )
    assert load(source).score(["p"], ["x"]) == [7.0]


def test_reward_object_in_a_file(load):
    source = "from eggroll.llm.rewards import TextReward\nreward = TextReward(scorer=len)\n"
    assert load(source).score(["p"], ["abc"]) == [3.0]


def test_imported_functions_count_only_if_nothing_is_defined(load, tmp_path):
    (tmp_path / "my_helper_module.py").write_text("def helper_reward(completions, **k):\n    return [5.0]\n")
    imports = "from my_helper_module import helper_reward\n"
    assert load(imports).score(["p"], ["x"]) == [5.0]
    assert load(imports + "def score(text):\n    return 1.0\n", name="own.py").score(["p"], ["x"]) == [1.0]
    del sys.modules["my_helper_module"]


def test_dataclasses_work_in_a_reward_file(load):
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Rule:\n    word: str\n"
        "def score(text):\n    return float(Rule('a').word in text)\n"
    )
    assert load(source).score(["p"], ["abc"]) == [1.0]


def test_missing_file(tmp_path, tiny_tokenizer):
    (tmp_path / "score.py").write_text("")
    message = message_of(lambda: load_reward(str(tmp_path / "scores.py"), tiny_tokenizer))
    assert message == (
        f"reward file {tmp_path / 'scores.py'} does not exist. Python files in {tmp_path}: score.py. A reward is "
        "'perplexity', a task of eggroll (calculator, countdown, gsm8k, guess_number, maze, one_sentence, zeros, "
        "reasoning-gym:NAME), a Python file, "
        "'lambda text: ...' or 'package.module:function'"
    )


def test_file_without_a_reward(load, tmp_path):
    message = message_of(lambda: load("import math\ndef evaluate(text):\n    return 1.0\ndef _hidden(): pass\n"))
    assert message == (
        f"reward file {tmp_path / 'score.py'} has no reward function; functions in it: evaluate. Define one of "
        "score(text) -> float, reward(prompts, completions, **columns) -> list[float], reward_fn(outputs, prompts) -> "
        "list[float] or reward_fn(model, inputs) -> float; a name that starts or ends with 'reward' counts too, and "
        f"'{tmp_path / 'score.py'}:name' takes any function"
    )
    assert load("def evaluate(text):\n    return 1.0\n", ":evaluate").score(["p"], ["x"]) == [1.0]
    message = message_of(lambda: load("def evaluate(text):\n    return 1.0\n", ":evalute"))
    assert message == f"reward file {tmp_path / 'score.py'} has no 'evalute'; functions in it: evaluate"


def test_file_with_two_conventions(load, tmp_path):
    message = message_of(lambda: load("def score(text): ...\ndef reward_fn(model, inputs): ...\n"))
    assert message == (
        f"reward file {tmp_path / 'score.py'} has several reward functions: reward_fn, score. "
        f"Say which one is meant: '{tmp_path / 'score.py'}:reward_fn'"
    )


def test_file_that_raises_has_its_line(load, tmp_path):
    with pytest.raises(RewardError) as info:
        load("import math\n\nx = undefined_name\n")
    assert str(info.value) == (
        f"reward file {tmp_path / 'score.py'} raised NameError at line 3 while it was loaded: "
        "name 'undefined_name' is not defined"
    )
    assert isinstance(info.value.__cause__, NameError)
    message = message_of(lambda: load("def score(text:\n"))
    assert message == f"reward file {tmp_path / 'score.py'} is not valid Python, line 1: '(' was never closed"
    assert "raised SystemExit at line 2" in message_of(lambda: load("import sys\nsys.exit(3)\n"))


def test_unknown_parameters(load):
    message = message_of(lambda: load("def reward_fn(a, b):\n    return 1.0\n"))
    assert message.startswith("the reward function 'reward_fn' has the parameters (a, b), from which its convention")


def test_dotted_name(tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "my_rewards_module.py").write_text("def anything(text):\n    return 2.0\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_rewards_module:anything", tiny_tokenizer).score(["p"], ["x"]) == [2.0]
    message = message_of(lambda: load_reward("my_rewards_module:nothing", tiny_tokenizer))
    assert message == "module my_rewards_module has no 'nothing'; functions in it: anything"
    message = message_of(lambda: load_reward("no_such_module:f", tiny_tokenizer))
    assert "the module of the reward 'no_such_module:f' cannot be imported: ModuleNotFoundError" in message
    del sys.modules["my_rewards_module"]


def test_unknown_word(tiny_tokenizer):
    message = message_of(lambda: load_reward("perplexty", tiny_tokenizer))
    assert message.startswith("unknown reward 'perplexty'. Did you mean perplexity? A reward is 'perplexity', a task")


def test_as_reward(tiny_tokenizer):
    text = TextReward(scorer=len)
    assert as_reward(text, tiny_tokenizer) is text
    assert isinstance(as_reward("perplexity", tiny_tokenizer), PerplexityReward)
    assert as_reward(lambda text: 4.0, tiny_tokenizer).score(["p"], ["x"]) == [4.0]
    assert as_reward([lambda text: 4.0], tiny_tokenizer).score(["p"], ["x"]) == [4.0]

    def one(completions, **_):
        return [1.0]

    def skipped(completions, **_):
        return [None]

    summed = as_reward([one, skipped], tiny_tokenizer)
    assert isinstance(summed, FunctionReward)
    assert summed.score(["p"], ["x"]) == [1.0]
    assert isinstance(as_reward([one, lambda text: 4.0], tiny_tokenizer), MultiReward)
    assert "a reward cannot be 3; allowed are a Reward, a function or a list" in message_of(lambda: as_reward(3, None))


def test_what_leaves_the_program_while_it_is_loaded(tmp_path, monkeypatch, tiny_tokenizer):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('no key')\n")
    monkeypatch.chdir(tmp_path)
    message = message_of(lambda: load_reward("leaves:reward", tiny_tokenizer))
    assert "the module of the reward 'leaves:reward' cannot be imported: SystemExit: no key" in message
    message = message_of(lambda: load_reward("lambda text, end=quit(1): 0.0", tiny_tokenizer))
    assert message.startswith("the reward 'lambda text, end=quit(1): 0.0' is not a valid lambda: ")
