"""What comes with a model cannot take a run's time without end: its chat template, and the number of its layers."""

import threading
import time
from types import SimpleNamespace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eggroll.errors import DataError, ModelError
from eggroll.llm.generation import chat
from eggroll.llm.generation.limits import time_limit
from eggroll.llm.models.loading import MOST_LAYERS, check_layers

LOOPS = (
    "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in messages %}{% endfor %}{% endfor %}{% endfor %}"
)


def tokenizer(template):
    made = ImmutableSandboxedEnvironment().from_string(template)

    def apply(messages, **_):
        return made.render(messages=messages)

    return SimpleNamespace(chat_template=template, apply_chat_template=apply, bos_token=None)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_template_with_loops_within_loops_ends(monkeypatch, system):
    """With a system message, too: templates that refuse one are tried again without."""
    monkeypatch.setattr(chat, "TEMPLATE_S", 0.2)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"the chat template does not come to an end: .*\(more than 0 s\)"):
        chat.format_prompts(tokenizer(LOOPS), ["hello"], system=system)
    assert time.monotonic() - start < 20
    assert chat.format_prompts(tokenizer("{{ messages[0].content }}"), ["hello"]) == ["hello"]


def test_the_limit_holds_in_any_thread_and_only_within_the_block():
    said = []

    def work():
        try:
            with time_limit(0.05, "it is slow"):
                while True:
                    pass
        except DataError as error:
            said.append(str(error))

    before = threading.active_count()  # other tests may have left some
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert said == ["it is slow (more than 0 s)"]
    for _ in range(50):  # around the limit: whatever comes first, nothing is raised afterwards
        try:
            with time_limit(0.002, "it is slow"):
                end = time.monotonic() + 0.002
                while time.monotonic() < end:
                    pass
        except DataError:
            pass
        for _ in range(100):
            pass
    assert threading.active_count() - before < 20


def test_an_error_of_the_block_is_its_own():
    with pytest.raises(KeyError, match="mine"), time_limit(60, "it is slow"):
        raise KeyError("mine")


@pytest.mark.parametrize("name", ["num_hidden_layers", "n_layer", "decoder_layers"])
def test_more_layers_than_any_model_has(name):
    check_layers(SimpleNamespace(**{name: MOST_LAYERS}))
    with pytest.raises(ModelError, match=rf"config.json says {name}=1e\+07, and no model has more than 4000 layers"):
        check_layers(SimpleNamespace(**{name: 10**7}))
    inner = SimpleNamespace(**{name: 10**7})
    with pytest.raises(ModelError, match=name):
        check_layers(SimpleNamespace(sub_configs={"text_config": object}, text_config=inner))
