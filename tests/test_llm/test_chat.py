"""Chat templates: what a model gets to read, and what a reward gets to see."""

import json
import re

import pytest

from eggroll import EggrollConfig, EggrollTrainer, PerplexityReward
from eggroll.errors import DataError
from eggroll.llm.data.examples import load_examples
from eggroll.llm.generation.chat import as_conversational, format_prompts, plain_text
from eggroll.llm.generation.encode import encode_prompts

USER = {"role": "user", "content": "hi"}
GEMMA_LIKE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
)


def test_conversation_opens_the_assistants_turn(tiny_tokenizer):
    assert format_prompts(tiny_tokenizer, [[USER]]) == ["<|user|>hi<|end|><|assistant|>"]


def test_strings_become_a_turn_if_there_is_a_template(tiny_tokenizer, plain_tokenizer):
    assert format_prompts(tiny_tokenizer, ["hi"]) == ["<|user|>hi<|end|><|assistant|>"]
    assert format_prompts(tiny_tokenizer, ["hi"], chat=False) == ["hi"]
    assert format_prompts(plain_tokenizer, ["hi"]) == ["hi"]


def test_system_message(tiny_tokenizer, plain_tokenizer):
    opening = "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert format_prompts(tiny_tokenizer, ["hi", [USER]], system="be brief") == [opening, opening]
    own = [{"role": "system", "content": "own"}, USER]
    assert format_prompts(tiny_tokenizer, [own], system="be brief")[0].startswith("<|system|>own<|end|>")
    assert format_prompts(plain_tokenizer, ["hi"], system="be brief") == ["be brief\n\nhi"]


def test_system_message_without_a_system_role_goes_into_the_first_user_turn(tiny_tokenizer):
    tiny_tokenizer.chat_template = GEMMA_LIKE
    conversation = [dict(USER)]
    assert format_prompts(tiny_tokenizer, [conversation], system="be brief") == ["<|start|>[user]be brief\n\nhi"]
    assert conversation == [USER]


def test_begun_assistant_turn_is_continued(tiny_tokenizer):
    begun = [USER, {"role": "assistant", "content": "Well,"}]
    assert format_prompts(tiny_tokenizer, [begun]) == ["<|user|>hi<|end|><|assistant|>Well,"]


class AddsStart:
    """A tokenizer that puts its start token in front, as Llama's does."""

    def __init__(self, tokenizer):
        self.inner = tokenizer

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text):
        return self.inner(self.inner.bos_token + text)


def test_start_token_is_not_doubled(tiny_tokenizer):
    tiny_tokenizer.chat_template = GEMMA_LIKE
    assert format_prompts(tiny_tokenizer, [[USER]]) == ["<|start|>[user]hi"]
    adding = AddsStart(tiny_tokenizer)
    (text,) = format_prompts(adding, [[USER]])
    assert text == "[user]hi"
    assert adding(text).input_ids == tiny_tokenizer.apply_chat_template([USER]).input_ids


def test_conversation_without_a_template(plain_tokenizer):
    plain_tokenizer.name_or_path = "tiny"
    message = "the prompts are conversations, but the tokenizer 'tiny' has no chat template."
    with pytest.raises(DataError, match=re.escape(message)):
        format_prompts(plain_tokenizer, [[USER]])
    with pytest.raises(DataError, match="has no chat template"):
        format_prompts(plain_tokenizer, ["hi"], chat=True)


def test_conversation_that_the_template_refuses(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    message = "the chat template refuses a conversation with the roles ['user', 'user']: roles must alternate"
    with pytest.raises(DataError, match=re.escape(message)):
        format_prompts(tiny_tokenizer, [[USER, USER]])


def test_as_conversational_is_what_trl_passes():
    begun = [USER, {"role": "assistant", "content": "Well,"}]
    prompts, completions = as_conversational(["a", [USER], begun], ["x", "y", " z"])
    assert prompts == ["a", [USER], [USER]]
    assert completions == [
        "x",
        [{"role": "assistant", "content": "y"}],
        [{"role": "assistant", "content": "Well, z"}],
    ]
    assert len(begun) == 2


def test_plain_text():
    assert plain_text("a") == "a"
    assert plain_text([USER]) == "hi"
    assert plain_text([]) == ""


def test_long_prompts_lose_their_beginning_and_say_so(tiny_tokenizer):
    """The question is at the end."""
    side = tiny_tokenizer.truncation_side
    texts = ["a" * 40 + "END", "short"]
    with pytest.warns(UserWarning, match=r"prompts of more than max_length \(=8\) tokens lose their beginning"):
        encoded = encode_prompts(tiny_tokenizer, texts, 8, chat=False)
    assert [tiny_tokenizer.decode(ids) for ids in encoded.input_ids] == ["aaaaaEND", "short"]
    assert tiny_tokenizer.truncation_side == side


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
WITH_TOOLS = (
    "{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking %}Hm.{% endif %}{% endif %}"
)


class TestColumnsOfTheTemplate:
    """TRL's columns ``tools`` and ``chat_template_kwargs`` were dropped without a word."""

    @pytest.mark.parametrize("tools", [TOOLS, tuple(TOOLS), json.dumps(TOOLS)], ids=["list", "tuple", "json"])
    @pytest.mark.parametrize("prompt", ["hi", [USER]], ids=["string", "conversation"])
    def test_tools(self, tiny_tokenizer, tools, prompt):
        tiny_tokenizer.chat_template = WITH_TOOLS
        expected = tiny_tokenizer.apply_chat_template([USER], tools=TOOLS, tokenize=False, add_generation_prompt=True)
        found = format_prompts(tiny_tokenizer, [prompt, prompt], columns=[{"tools": tools}, {"tools": None}])
        assert found == [expected, "<|user|>hi<|end|><|assistant|>"]
        assert '"name": "weather"' in found[0]
        (found,) = format_prompts(tiny_tokenizer, [prompt], columns=[{"tools": tools}], system="be brief")
        assert '"name": "weather"' in found
        assert "be brief" in found

    def test_tools_that_are_python_functions(self, tiny_tokenizer):
        def weather(city: str):
            """The weather in a city.

            Args:
                city: its name
            """

        tiny_tokenizer.chat_template = WITH_TOOLS
        assert '"name": "weather"' in format_prompts(tiny_tokenizer, [[USER]], columns=[{"tools": [weather]}])[0]

    def test_switches(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = WITH_TOOLS
        rows = [{"chat_template_kwargs": {"thinking": True}}, {"chat_template_kwargs": {"thinking": False}}]
        assert format_prompts(tiny_tokenizer, ["hi", "hi"], columns=rows) == [
            "<|user|>hi<|end|><|assistant|>Hm.",
            "<|user|>hi<|end|><|assistant|>",
        ]

    @pytest.mark.parametrize("tools", ["hammer, saw", "{", 3, {"name": "weather"}, ["weather"], "[" * 10**5])
    def test_tools_of_another_form(self, tiny_tokenizer, tools):
        with pytest.raises(DataError) as info:
            format_prompts(tiny_tokenizer, ["hi"], columns=[{"tools": tools}])
        assert str(info.value).startswith(
            "the column 'tools' goes to the chat template and must be a list of functions"
        )
        assert f"got {tools!r}"[:100] in str(info.value)

    @pytest.mark.parametrize("switches", ["thinking", ["thinking"], {"tokenize": True}, {"tools": TOOLS}])
    def test_switches_of_another_form(self, tiny_tokenizer, switches):
        with pytest.raises(
            DataError, match=r"'chat_template_kwargs' must be an object with switches .* none of add_gen"
        ):
            format_prompts(tiny_tokenizer, ["hi"], columns=[{"chat_template_kwargs": switches}])

    def test_tools_that_nothing_reads_are_warned_of(self, tiny_tokenizer, plain_tokenizer):
        with pytest.warns(UserWarning, match="the chat template of this model knows no tools: the model does not see"):
            format_prompts(tiny_tokenizer, ["hi"], columns=[{"tools": TOOLS}])
        with pytest.warns(UserWarning, match="plain prompts go through no chat template: the model does not see"):
            assert format_prompts(plain_tokenizer, ["hi"], columns=[{"tools": TOOLS}]) == ["hi"]

    def test_likelihood(self, tiny_tokenizer):
        tiny_tokenizer.chat_template = WITH_TOOLS
        (example,) = load_examples([{"messages": [USER, {"role": "assistant", "content": "sun"}], "tools": TOOLS}])
        batch = PerplexityReward(tiny_tokenizer, max_length=4096).encode([example])
        read = tiny_tokenizer.decode(batch["input_ids"][0])
        scored = tiny_tokenizer.decode(batch["input_ids"][0][batch["labels"][0] >= 0])
        assert '"name": "weather"' in read
        assert scored == "sun<|end|>"

    def test_what_the_evaluators_of_all_backends_encode(self, tiny_model, tiny_tokenizer):
        tiny_tokenizer.chat_template = WITH_TOOLS
        config = EggrollConfig(population_size=2, max_length=4096)
        trainer = EggrollTrainer(tiny_model, config, len, tiny_tokenizer)
        rows = load_examples([{"prompt": [USER], "tools": TOOLS}, {"prompt": "hi"}])
        first, second = trainer.worker.evaluator.encode(rows).input_ids
        expected = tiny_tokenizer.apply_chat_template([USER], tools=TOOLS, add_generation_prompt=True).input_ids
        assert first == expected
        assert tiny_tokenizer.decode(second) == "<|user|>hi<|end|><|assistant|>"


def test_half_a_character_in_a_system_message(tiny_tokenizer):
    with pytest.raises(DataError, match="a prompt with its system message has half of a character"):
        format_prompts(tiny_tokenizer, ["hi"], system="\ud83d")
