"""Turns that go on from what is kept are those that are read anew, token for token."""

import pytest
import torch

from eggroll.llm.generation.encode import Encoded
from eggroll.llm.generation.generate import Sampling, generate
from eggroll.llm.generation.memory import Memory
from eggroll.llm.models.loading import load
from eggroll.llm.worlds.chat import Chat
from eggroll.torch import Population

ENDS = [5, 9, 17, 33, 57, 111, 112, 113, 114, 120, 130, 140, 200, 201, 202, 203]
"""Many, so that rows of a random model stop at different steps."""


def talk(
    model, prompts, news, *, keep, members=1, active=None, max_tokens=7, rewrite=False, temperature=0.0, ends=ENDS
):
    """Conversations of ``members`` with every prompt; each turn some rows go on, with what ``news`` says of it."""
    count = len(prompts)
    ids = {row: list(prompts[row % count]) for row in range(members * count)}
    memory = Memory.of(model) if keep else None
    said, read = {row: [] for row in ids}, []
    for turn, new in enumerate(news):
        rows = [row for row in ids if new[row % len(new)] is not None]
        if turn:
            for row in rows:
                ids[row] = [*ids[row], *new[row % len(new)]]
                if rewrite:
                    ids[row][len(ids[row]) // 2] = 7
        padded, mask = Encoded([ids[row] for row in rows]).padded(0, left=True)
        owner = torch.tensor([row // count for row in rows])

        def select(kept, state={"owner": owner}):  # noqa: B006
            state["owner"] = state["owner"][kept]
            if active is not None:
                active.select_rows(state["owner"])

        if active is not None:
            active.select_rows(owner)
        if memory is not None:
            memory.rows = rows
            before = memory.read
        made = generate(
            model, padded, mask, max_tokens=max_tokens, eos_ids=ends, pad_id=0, select_rows=select,
            sampling=Sampling.for_rows(temperature, 1, turn, rows), memory=memory,
        )  # fmt: skip
        read.append((memory.read - before) / len(rows) if memory is not None else padded.shape[1])
        for row, tokens in zip(rows, made, strict=True):
            ids[row] = [*ids[row], *tokens]
            said[row].append(tokens)
    return said, read


PROMPTS = [[20, 21, 22, 23, 24, 25], [30, 31], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49], [60, 61, 62]]
NEWS = [
    [[]],
    [[3, 70, 71], [3, 72], [3, 73, 74, 75, 76, 77, 78, 79, 80], [3]],
    [[3, 81], None, [3, 82, 83], [3, 84, 85, 86]],
    [None, None, [3, 90], [3, 91, 92, 93, 94, 95]],
]


@pytest.mark.parametrize(
    ("name", "temperature"), [("llama", 0.0), ("llama", 1.0), ("gpt2", 0.0), ("cohere", 0.0), ("mixtral", 0.0)]
)
def test_cached_turns_are_those_read_anew(build_model, name, temperature):
    model = build_model(name, torch.float64)
    kept, read = talk(model, PROMPTS, NEWS, keep=True, temperature=temperature)
    anew, whole = talk(model, PROMPTS, NEWS, keep=False, temperature=temperature)
    assert kept == anew
    assert len({len(turn) for turns in kept.values() for turn in turns}) > 2
    assert read[0] == whole[0]
    assert all(few < all_of_it / 2 for few, all_of_it in zip(read[1:], whole[1:], strict=True))


@pytest.mark.parametrize("members", [2, 4])
def test_members_go_on_as_themselves(build_model, members):
    model = build_model("llama")
    population = Population(model, population_size=4, sigma=0.2, rank=1)
    with torch.no_grad(), population.perturbed(0, range(members)) as active:
        together, _ = talk(model, PROMPTS, NEWS, keep=True, members=members, active=active)
    assert len({str(together[row]) for row in together}) > len(PROMPTS)
    for member in range(members):
        with torch.no_grad(), population.member(0, member):
            alone, _ = talk(model, PROMPTS, NEWS, keep=False)
        assert [together[member * len(PROMPTS) + row] for row in alone] == list(alone.values())


def test_a_conversation_that_was_rewritten_is_read_anew_from_there(tiny_model):
    kept, _ = talk(tiny_model, PROMPTS, NEWS, keep=True, rewrite=True)
    assert kept == talk(tiny_model, PROMPTS, NEWS, keep=False, rewrite=True)[0]


@pytest.mark.parametrize("name", ["gemma2", "mamba", "t5"])
def test_windows_states_and_encoders_keep_nothing(build_model, name):
    assert Memory.of(build_model(name)) is None


@pytest.mark.model
@pytest.mark.slow
def test_a_real_model_goes_on_as_if_it_read_everything():
    """SmolLM2-135M in float32, three turns of members of a population, in its chat template."""
    loaded = load("smollm2-135m", dtype="float32")
    tokenizer, ends = loaded.tokenizer, [loaded.tokenizer.eos_token_id]
    chat = Chat(tokenizer, ends)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in ("What is rain?", "Name three rivers, with the countries that they are in.", "Hi!")
    ]
    more = [chat.after([{"role": "user", "content": text}], {}) for text in ("Why?", "Say it in other words.", "No.")]
    news = [[[]], more, [more[1], None, more[0]]]
    population = Population(loaded.model, population_size=2, sigma=0.01, rank=1)
    found = []
    for keep in (True, False):
        with torch.no_grad(), population.perturbed(0, range(2)) as active:
            found.append(talk(loaded.model, prompts, news, keep=keep, members=2, active=active, ends=ends))
    (kept, read), (anew, whole) = found
    assert kept == anew
    assert [len(turns) for turns in kept.values()] == [3, 2, 3] * 2
    assert sum(read) < sum(whole) / 2
