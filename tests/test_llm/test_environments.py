"""TRL's environments and tools, as a GRPOTrainer takes them, and how tools get to a model and calls from it."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from eggroll.errors import ConfigError, DataError
from eggroll.llm import EggrollConfig, EggrollTrainer
from eggroll.llm.backends.turns import TurnSpeaker
from eggroll.llm.worlds.chat import Chat
from eggroll.llm.worlds.load import with_world
from eggroll.llm.worlds.toolcalls import calls_in

# The template of Qwen2.5 in short: functions in the system message, calls and results in tags.
TOOL_TEMPLATE = """{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}
{%- for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>
{%- if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>
{%- endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


class Counter:
    """An environment as TRL's documentation has them."""

    made = 0

    def __init__(self):
        Counter.made += 1
        self.count = 0

    def reset(self, start: int = 0, **kwargs) -> str | None:
        self.count = start
        return f" The counter is at {start}."

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.count += step
        return self.count


class Scored(Counter):
    def get_reward(self) -> float:
        return self.count / 10


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


async def later(text: str) -> str:
    """
    Answers later.

    Args:
        text: What to answer.
    """
    return text.upper()


def count_reward(completions, environments, **kwargs):
    return [float(environment.count) for environment in environments]


DATA = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": "Count."}], [{"role": "user", "content": "Add."}]], "start": [3, 5]}
)
CONFIG = EggrollConfig(population_size=2, rank=1, max_tokens=8, prompts_per_generation=2, max_length=4000)


@pytest.fixture
def scripted(monkeypatch):
    """``scripted(tokenizer, [texts of turn 1, of turn 2, ...])``: what all rows say, in the place of a model."""

    def script(tokenizer, *turns):
        seen = []

        def say(self, rows, ids, turn):
            seen.append([tokenizer.decode(row) for row in ids])
            return [tokenizer(turns[turn], add_special_tokens=False).input_ids for _ in rows]

        monkeypatch.setattr(TurnSpeaker, "say", say)
        return seen

    return script


def call(name, **arguments):
    return f"Wait. <tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture
def tool_tokenizer(tiny_tokenizer):
    tiny_tokenizer.chat_template = TOOL_TEMPLATE
    return tiny_tokenizer


def trainer(model, tokenizer, reward=None, **what):
    made = EggrollTrainer(model, CONFIG, reward, tokenizer, **what)
    made.worker.use(DATA, DATA)
    return made.worker


def test_an_environment_of_trl_runs_as_it_is(tiny_model, tool_tokenizer, scripted):
    seen = scripted(tool_tokenizer, call("increment", step=4), call("increment", step=2), "Done.")
    worker = trainer(tiny_model, tool_tokenizer, [count_reward], environment_factory=Counter)
    made = Counter.made
    found = worker.heldout(0)
    assert [sample["reward"] for sample in found.samples] == [9.0, 11.0]
    assert Counter.made - made == 2
    worker.heldout(0)
    assert Counter.made - made == 2, "an environment is made once and reset for the next conversation"
    first = found.samples[0]
    assert first["prompt"] == "Count. The counter is at 3."
    assert [m["role"] for m in first["completion"]] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert first["completion"][1] == {"role": "tool", "name": "increment", "content": "7"}
    assert first["completion"][0]["tool_calls"][0]["function"] == {"name": "increment", "arguments": {"step": 4}}
    assert '"name": "increment"' in seen[0][0]
    assert "Increment the internal counter." in seen[0][0]
    assert "reset" not in seen[0][0]
    tail = "<|end|><|user|><tool_response>7</tool_response><|end|><|assistant|>"
    assert seen[1][0] == seen[0][0] + call("increment", step=4) + tail


def test_an_environment_may_score_itself(tiny_model, tool_tokenizer, scripted):
    scripted(tool_tokenizer, call("increment", step=4), "Done.")
    alone = trainer(tiny_model, tool_tokenizer, environment_factory=Scored)
    assert alone.heldout(0).reward == pytest.approx((0.7 + 0.9) / 2)
    both = trainer(tiny_model, tool_tokenizer, [count_reward], environment_factory=Scored)
    assert both.heldout(0).reward == pytest.approx((0.7 + 7 + 0.9 + 9) / 2)


def test_rows_choose_among_environments(tiny_model, tool_tokenizer, scripted):
    class Other(Scored):
        def shout(self, text: str) -> str:
            """
            Shouts.

            Args:
                text: What to shout.
            """
            return text.upper()

    seen = scripted(tool_tokenizer, "Hm.")
    made = EggrollTrainer(tiny_model, CONFIG, None, tool_tokenizer, environment_factory={"one": Scored, "two": Other})
    rows = [{"environment": "one", "start": 1}, {"environment": "two", "start": 2}, {"environment": "no"}]
    made.worker.use(rows, rows)
    with pytest.warns(match="'no'.*must name one of the environments: 'one', 'two'"):
        found = made.worker.heldout(0)
    assert [sample["reward"] for sample in found.samples] == [0.1, 0.2, 0.0]
    assert ["shout" in text for text in seen[0]] == [False, True]


def test_tools_are_called_async_ones_too(tiny_model, tool_tokenizer, scripted):
    def said(completions, **kwargs):
        return [float("42" in str(completion)) for completion in completions]

    seen = scripted(tool_tokenizer, call("multiply", a=6, b=7) + call("later", text="ok"), call("divide", a=1), "42")
    found = trainer(tiny_model, tool_tokenizer, [said], tools=[multiply, later]).heldout(0)
    assert found.reward == 1.0
    results = [m["content"] for m in found.samples[0]["completion"] if m["role"] == "tool"]
    assert results == ["42", "OK", "{'error': 'Tool divide not found.'}"]
    assert "<tool_response>42</tool_response><|end|><|user|><tool_response>OK</tool_response>" in seen[1][0]


def test_what_a_tool_raises_is_told_to_the_model(tiny_model, tool_tokenizer, scripted):
    scripted(tool_tokenizer, call("multiply", a=6), "I see.")
    worker = trainer(tiny_model, tool_tokenizer, [lambda completions, **kw: [1.0] * len(completions)], tools=[multiply])
    message = worker.heldout(0).samples[0]["completion"][1]
    assert "missing 1 required positional argument: 'b'" in message["content"]


def test_a_template_without_tools_gets_them_in_the_system_message(tiny_model, tiny_tokenizer, scripted):
    seen = scripted(tiny_tokenizer, call("increment", step=1), "Done.")
    found = trainer(tiny_model, tiny_tokenizer, [count_reward], environment_factory=Counter).heldout(0)
    assert [sample["reward"] for sample in found.samples] == [4.0, 6.0]
    assert seen[0][0].startswith("<|system|>You may call functions.")
    assert '"name": "increment"' in seen[0][0]


def test_rewards_do_not_see_environments_that_failed(tiny_model, tool_tokenizer, scripted):
    class Fragile(Counter):
        def reset(self, start: int = 0, **kwargs) -> None:
            if start == 5:
                raise OSError("no server")
            super().reset(start)

    def checked(completions, environments, log_extra, **kwargs):
        log_extra("count", [environment.count for environment in environments])
        return [float(environment.count) for environment in environments]

    scripted(tool_tokenizer, "Done.")
    worker = trainer(tiny_model, tool_tokenizer, [checked], environment_factory=Fragile)
    worker.evaluator.worlds.config = dataclasses.replace(CONFIG, world_failure_score=-1.0)
    with pytest.warns(match="reset.. raised OSError: no server"):
        found = worker.heldout(0)
    assert [sample["reward"] for sample in found.samples] == [3.0, -1.0]
    assert [sample["logged"]["count"] for sample in found.samples] == [3, None]


def test_whatever_scores_nothing_or_cannot_be_described_is_refused():
    with pytest.raises(ConfigError, match=r"nothing scores Counter: give a reward, or a method get_reward\(\)"):
        with_world(None, Counter)
    with pytest.raises(ConfigError, match=r"the environment dict has no reset"):
        with_world(None, dict)
    with pytest.raises(DataError, match="the tool '<lambda>' cannot be described to a model"):
        with_world(lambda text: 1.0, None, [lambda a: a])
    with pytest.raises(ConfigError, match="there is no reward, and no world that scores"):
        with_world(None)


def test_a_rollout_function_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"Write what it does as a World with reset\(row\) and step\(completion\)"):
        EggrollTrainer.from_model_id("tiny", CONFIG, [count_reward], rollout_func=lambda prompts, trainer: {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
        ('<tool_call>{"name": "f"}</tool_call> and <tool_call>{"name": "g"}</tool_call>', [("f", {}), ("g", {})]),
        ("<tool_call>f(1)</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call><tool_call>[1]</tool_call>', []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', []),
        ("no call", []),
        ("<tool_call>" * 1000 + "[" * 100_000, []),
    ],
)
def test_calls_are_read(tiny_tokenizer, text, expected):
    found = calls_in(tiny_tokenizer, text, [], [], [])
    assert [(one["name"], one["arguments"]) for one in found] == expected


class TestTemplates:
    """What is appended to a conversation is what the template would have written."""

    @pytest.fixture
    def templates(self):
        pytest.importorskip("trl", reason="trl, of the extra `grpo`, is not installed")
        from importlib.resources import files

        folder = files("trl") / "chat_templates"
        return {
            file.name.removesuffix(".jinja"): file.read_text() for file in folder.iterdir() if ".jinja" in file.name
        }

    @pytest.mark.parametrize(
        ("name", "end"),
        [("qwen2_5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("llama3_1", "<|eot_id|>"), ("gemma3", "<end_of_turn>"),
         ("phi3", "<|end|>"), ("qwen3_instruct_2507", "<|im_end|>")],
    )  # fmt: skip
    @pytest.mark.parametrize("role", ["user", "tool"])
    def test_of_known_models(self, templates, plain_tokenizer, name, end, role):
        plain_tokenizer.chat_template = templates[name]
        plain_tokenizer.add_tokens([end], special_tokens=True)
        plain_tokenizer.eos_token = end
        chat = Chat(plain_tokenizer, [plain_tokenizer.eos_token_id])
        said = plain_tokenizer.decode(chat.after([{"role": role, "name": "f", "content": "seven"}], {}))
        assert said.startswith(end)
        assert "seven" in said
        assert "ANSWER" not in said
        opening = plain_tokenizer.apply_chat_template(
            [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
        )
        begin = re.split(r"\?", opening)[1]  # the end of the user's turn, and the opening of the assistant's
        assert said.endswith(begin.strip("\n")) or begin.endswith(said[-12:])


def test_templates_without_end_tokens_or_with_short_messages(tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat = Chat(tiny_tokenizer, [tiny_tokenizer.eos_token_id])
    assert tiny_tokenizer.decode(chat.after([{"role": "user", "content": "why"}], {})) == "\nuser: why\nassistant: "
    tiny_tokenizer.chat_template = TOOL_TEMPLATE
    chat = Chat(tiny_tokenizer, [tiny_tokenizer.eos_token_id])
    for content in ("", "t", "}"):
        said = tiny_tokenizer.decode(chat.after([{"role": "tool", "name": "f", "content": content}], {}))
        assert said == f"<|end|><|user|><tool_response>{content}</tool_response><|end|><|assistant|>"


def test_a_template_that_drops_messages_cannot_be_used(tiny_tokenizer):
    tiny_tokenizer.chat_template = "Hello!"
    with pytest.raises(DataError, match=r"leaves out what messages with the roles \['user'\] say"):
        Chat(tiny_tokenizer, []).after([{"role": "user", "content": "why"}], {})


class TestWithTrl:
    """The same classes and functions under TRL itself."""

    @pytest.fixture
    def tokenizer(self, plain_tokenizer):
        pytest.importorskip("trl", reason="trl, of the extra `grpo`, is not installed")
        from importlib.resources import files

        plain_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        plain_tokenizer.eos_token = plain_tokenizer.pad_token = "<|im_end|>"
        plain_tokenizer.padding_side = "left"
        self.folder = files("trl") / "chat_templates"
        plain_tokenizer.chat_template = (self.folder / "qwen2_5.jinja").read_text()
        return plain_tokenizer

    @pytest.mark.parametrize(
        ("name", "stable"),
        [("qwen2_5", "qwen2_5"), ("qwen3", "qwen3_training"), ("qwen3_instruct_2507", "qwen3_instruct_2507")],
    )
    def test_what_follows_a_call_is_what_trl_puts_there(self, tokenizer, name, stable):
        """TRL needs another template where a model's own writes earlier turns otherwise; this package does not."""
        from trl import GRPOTrainer

        messages = [{"role": "tool", "name": "f", "content": "7"}, {"role": "tool", "name": "g", "content": "eight"}]
        stand_in = SimpleNamespace(
            processing_class=tokenizer, _tokenizer=tokenizer, chat_template_kwargs={}, _is_vlm=False
        )
        stand_in.chat_template = (self.folder / f"{stable}.jinja").read_text()
        theirs = GRPOTrainer._get_tool_suffix_ids(stand_in, messages)
        tokenizer.chat_template = (self.folder / f"{name}.jinja").read_text()
        ours = Chat(tokenizer, [tokenizer.eos_token_id]).after(messages, {})
        assert ours == [tokenizer.eos_token_id, *theirs]

    def test_calls_are_read_as_trl_reads_them(self, tokenizer):
        from trl.chat_template_utils import add_response_schema, parse_response

        add_response_schema(tokenizer)
        assert tokenizer.response_template
        prefix = tokenizer.apply_chat_template(DATA[0]["prompt"], add_generation_prompt=True, return_dict=False)
        for text in (call("increment", step=4), call("f", a="x") + call("g"), "no call", "<tool_call>broken"):
            ids = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
            theirs = parse_response(tokenizer, ids, prefix=prefix).get("tool_calls") or []
            ours = calls_in(tokenizer, text, ids, prefix, [])
            assert ours == [one["function"] for one in theirs]

    @pytest.mark.slow
    def test_one_script_runs_with_both(self, build_model, tokenizer, tmp_path):
        from trl import GRPOConfig, GRPOTrainer

        settings = {"output_dir": str(tmp_path), "max_steps": 1, "num_generations": 2, "max_completion_length": 8}
        settings |= {"per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "save_strategy": "no"}
        theirs = GRPOTrainer(
            model=build_model("llama"), reward_funcs=[count_reward], args=GRPOConfig(**settings), train_dataset=DATA,
            processing_class=tokenizer, environment_factory=Counter,
        )  # fmt: skip
        theirs.train()
        assert theirs.state.global_step == 1
        ours = EggrollTrainer(build_model("llama"), CONFIG, [count_reward], tokenizer, environment_factory=Counter)
        ours.evolve(DATA)
        assert ours.history[-1]["worlds/turns"] == 1.0
