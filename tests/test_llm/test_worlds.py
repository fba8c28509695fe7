"""Conversations with worlds: who speaks when, what it scores, and what becomes of worlds that fail."""

import asyncio
import dataclasses
import sys
import time

import numpy as np
import pytest

from eggroll.errors import ConfigError, RewardError
from eggroll.llm import Turn, World, WorldReward
from eggroll.llm.backends import turns
from eggroll.llm.backends.build import worker_of
from eggroll.llm.backends.torch import MESSAGE_TOKENS
from eggroll.llm.backends.turns import TurnSpeaker
from eggroll.llm.config import EggrollConfig
from eggroll.llm.generation.memory import Memory
from eggroll.llm.worlds.scoring import WorldFailureWarning


class Echo(World):
    """Answers with what it was told, ``turns`` times, and scores the letters."""

    def reset(self, row):
        self.row, self.said = row, []
        return f"Begin with {row['prompt']}"

    def step(self, completion):
        self.said.append(str(completion))
        over = len(self.said) >= self.row["turns"]
        return Turn(f"You said {len(completion)} letters", done=over, score=sum(map(len, self.said)) / 10)


ROWS = [{"prompt": f"word {n}", "turns": n} for n in (1, 3, 2, 4)]
SETTINGS = {
    "population_size": 4, "rank": 1, "sigma": 0.3, "max_tokens": 6, "prompts_per_generation": 4, "vectors": True,
    "samples_per_generation": 4,
}  # fmt: skip


def worker(model, tokenizer, world, rows=ROWS, **changes):
    config = EggrollConfig(**{**SETTINGS, **changes})
    made = worker_of(model, config, WorldReward(world) if isinstance(world, type) else world, tokenizer)
    made.use(rows, rows)
    return made


def conversations(found):
    return [(sample["member"], sample["completion"], sample["reward"]) for sample in found.samples]


@pytest.fixture
def counted(monkeypatch):
    """How many rows each turn generates."""
    seen, say = [], TurnSpeaker.say

    def note(self, rows, ids, turn):
        seen.append(len(rows))
        return say(self, rows, ids, turn)

    monkeypatch.setattr(TurnSpeaker, "say", note)
    return seen


def test_a_conversation_goes_back_and_forth(tiny_model, tiny_tokenizer, counted):
    found = worker(tiny_model, tiny_tokenizer, Echo).heldout(0)
    last = found.samples[3]
    roles = [message["role"] for message in last["completion"]]
    assert roles == ["assistant", "user"] * 4
    letters = [len(m["content"]) for m in last["completion"] if m["role"] == "assistant"]
    assert [m["content"] for m in last["completion"] if m["role"] == "user"] == [
        f"You said {n} letters" for n in letters
    ]
    assert last["reward"] == pytest.approx(sum(letters) / 10)
    assert last["prompt"] == "Begin with word 4"
    assert last["logged"] == {"turns": 4, "end": "done"}
    assert found.metrics == {"heldout_worlds/turns": 2.5, "heldout_worlds/failed_fraction": 0.0}
    assert counted == [4, 3, 2, 1], "rows whose conversation is over are not generated any more"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_members_together_say_what_each_says_alone(tiny_model, tiny_tokenizer, temperature, counted):
    made = worker(tiny_model, tiny_tokenizer, Echo, temperature=temperature)
    together = made.evaluate(0, 0.3, range(4))
    assert made.evaluator.population.mode == "rows"
    assert counted == [16, 12, 8, 4]
    made.evaluator.population.mode = "loop"
    alone = made.evaluate(0, 0.3, range(4))
    assert conversations(together) == conversations(alone)
    np.testing.assert_allclose(together.fitness, alone.fitness)
    assert len({str(talk) for _, talk, _ in conversations(together)}) > 2
    assert together.tokens == alone.tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_kept_caches_change_nothing(build_model, tiny_tokenizer, monkeypatch, name):
    """gemma2 has windows, so nothing is kept of it."""
    made = worker(build_model(name), tiny_tokenizer, Echo)
    kept = made.evaluate(0, 0.3, range(4))
    monkeypatch.setattr(turns.Memory, "of", lambda model: None)
    anew = made.evaluate(0, 0.3, range(4))
    assert conversations(kept) == conversations(anew)


def test_only_new_tokens_are_read(tiny_model, tiny_tokenizer, monkeypatch):
    made, memories, of = worker(tiny_model, tiny_tokenizer, Echo), [], Memory.of

    def noted(model):
        memories.append(of(model))
        return memories[-1]

    monkeypatch.setattr(turns.Memory, "of", noted)
    made.heldout(0)
    opening = len("<|user|>Begin with word 1<|end|><|assistant|>".replace("<|", "").replace("|>", "")) - 10
    assert memories[0].read < 4 * opening + (3 + 2 + 1) * 45


def test_each_turn_samples_anew(tiny_model, tiny_tokenizer):
    class Same(Echo):
        def step(self, completion):
            turn = super().step(completion)
            return dataclasses.replace(turn, messages="?")

    made = worker(tiny_model, tiny_tokenizer, Same, temperature=5.0, rows=[{"prompt": "x", "turns": 4}])
    found = made.heldout(0).samples[0]["completion"]
    assert len({m["content"] for m in found if m["role"] == "assistant"}) == 4


class Failing(Echo):
    """Fails in the way that its row says, in the turn that it says."""

    def reset(self, row):
        if row["turns"] == 0:
            raise OSError("no such dungeon")
        return super().reset(row)

    def step(self, completion):
        turn = super().step(completion)
        if len(self.said) < 2:
            return turn
        ways = {
            "raise": lambda: 1 / 0, "exit": lambda: sys.exit(3),
            "nan": lambda: dataclasses.replace(turn, score=float("nan")),
            "text": lambda: dataclasses.replace(turn, score="good"), "flood": lambda: Turn("x" * 20_001, score=1.0),
            "loop": self.loop, "sleep": lambda: time.sleep(3), "wrong": lambda: 7, "silent": lambda: Turn(score=1.0),
            "message": lambda: Turn([{"role": "user"}]), "half": lambda: Turn("\ud83d", score=1.0),
            "async": self.wait, "raise async": self.fail,
        }  # fmt: skip
        return ways[self.row["way"]]() if "way" in self.row else turn

    def loop(self):
        while True:
            pass

    async def wait(self):
        await asyncio.sleep(3)

    async def fail(self):
        raise LookupError("gone")


WAYS = {
    "raise": "step() raised ZeroDivisionError: division by zero",
    "exit": "step() raised SystemExit: 3",
    "nan": "step() scored nan; a score is a finite number",
    "text": "step() scored str 'good'; a score is a number",
    "flood": "step() said 20,001 characters; at most 20,000 are allowed",
    "loop": "step() did not return within 0.3 s",
    "sleep": "step() did not return within 0.3 s",
    "wrong": "step() returned int 7; it must return Turn(messages, done=..., score=...)",
    "silent": "step() returned a turn without messages that is not done",
    "message": "step() returned list [{'role': 'user'}]; messages are a string, or a list of",
    "half": "step() has half of a character",
    "async": "step() did not return within 0.3 s",
    "raise async": "step() raised LookupError: gone",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_world_that_fails_costs_its_row(tiny_model, tiny_tokenizer, way, recwarn):
    rows = [{"prompt": "a", "turns": 3}, {"prompt": "b", "turns": 3, "way": way}, {"prompt": "c", "turns": 3}]
    made = worker(tiny_model, tiny_tokenizer, Failing, rows, world_timeout=0.3, world_failure_score=-2.5)
    found = made.heldout(0)
    first, failed, last = found.samples
    assert failed["reward"] == -2.5
    assert failed["logged"]["end"].startswith(f"failed: world Failing: {WAYS[way]}")
    assert [m["role"] for m in failed["completion"]] == ["assistant", "user", "assistant"]
    assert first["logged"]["end"] == last["logged"]["end"] == "done"
    assert found.metrics["heldout_worlds/failed_fraction"] == pytest.approx(1 / 3)
    said = [str(w.message) for w in recwarn if issubclass(w.category, WorldFailureWarning)]
    assert len(said) == 1
    assert "(1 of 3 conversations; each scores -2.5, --world-failure-score)" in said[0]
    made.evaluator.worlds._held = True
    assert made.heldout(0).samples[0]["completion"] == first["completion"]


def test_a_world_that_cannot_begin_costs_its_row(tiny_model, tiny_tokenizer):
    rows = [{"prompt": "a", "turns": 2}, {"prompt": "b", "turns": 0}]
    with pytest.warns(WorldFailureWarning, match=r"reset\(\) raised OSError: no such dungeon"):
        found = worker(tiny_model, tiny_tokenizer, Failing, rows).heldout(0)
    assert [sample["reward"] > 0 for sample in found.samples] == [True, False]
    assert found.samples[1]["completion"] == []


def test_an_opening_that_the_template_refuses_costs_its_row(tiny_model, tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'oracle' %}{{ raise_exception('no oracles') }}{% endif %}"
        + tiny_tokenizer.chat_template
    )

    class Oracle(Echo):
        def reset(self, row):
            said = super().reset(row)
            return [{"role": "oracle", "content": "hm"}] if row["prompt"] == "b" else said

    rows = [{"prompt": "a", "turns": 1}, {"prompt": "b", "turns": 1}]
    with pytest.warns(
        WorldFailureWarning, match=r"what the conversation begins with cannot be put to the model.*no ora"
    ):
        found = worker(tiny_model, tiny_tokenizer, Oracle, rows).heldout(0)
    assert [sample["logged"]["end"][:6] for sample in found.samples] == ["done", "failed"]


def test_a_model_without_a_chat_template_cannot_converse(tiny_model, plain_tokenizer):
    with pytest.raises(RewardError, match=r"every one of the first 4 conversations failed.*has no chat template"):
        worker(tiny_model, plain_tokenizer, Echo).heldout(0)


def test_a_run_does_not_begin_if_every_conversation_fails(tiny_model, tiny_tokenizer):
    made = worker(tiny_model, tiny_tokenizer, Failing, [{"prompt": "a", "turns": 0}])
    with pytest.raises(RewardError, match=r"every one of the first 4 conversations failed; world Failing: reset\(\)"):
        made.evaluate(0, 0.1, range(4))


@pytest.mark.parametrize(
    ("changes", "end", "count"), [({"max_turns": 2}, "turns", 2), ({"max_length": 60}, "length", 2), ({}, "done", 4)]
)
def test_conversations_have_limits(tiny_model, tiny_tokenizer, changes, end, count):
    found = worker(tiny_model, tiny_tokenizer, Echo, [{"prompt": "a", "turns": 4}], **changes).heldout(0).samples[0]
    assert found["logged"]["end"] == end
    assert found["logged"]["turns"] == count
    assert found["reward"] > 0, "what the world has scored so far counts"


def test_a_world_may_score_at_the_end(tiny_model, tiny_tokenizer):
    class Late(Echo):
        closed = 0

        def step(self, completion):
            return dataclasses.replace(super().step(completion), score=None)

        async def score(self):
            return len(self.said)

        def close(self):
            Late.closed += 1

    found = worker(tiny_model, tiny_tokenizer, Late).heldout(0)
    assert [sample["reward"] for sample in found.samples] == [1, 3, 2, 4]
    assert Late.closed == 4


def test_a_world_without_a_score_fails(tiny_model, tiny_tokenizer):
    class Silent(Echo):
        def step(self, completion):
            return dataclasses.replace(super().step(completion), score=None)

    with pytest.raises(RewardError, match="the world gave no score: neither a turn has one, nor score"):
        worker(tiny_model, tiny_tokenizer, Silent).heldout(0)


def test_the_settings_are_checked():
    with pytest.raises(ConfigError) as caught:
        EggrollConfig(max_turns=0, world_timeout=0, world_failure_score=float("nan"), world_workers=-1)
    said = str(caught.value)
    assert "max_turns (=0)" in said
    assert "world_workers (=-1)" in said
    assert "world_timeout (=0) must be a number of seconds above 0" in said
    assert "world_failure_score (=nan) must be a finite number" in said


def test_what_makes_no_world_is_refused():
    with pytest.raises(RewardError, match="WorldReward needs a class of worlds"):
        WorldReward(3)


def test_an_estimate_knows_that_conversations_are_long(tiny_model, tiny_tokenizer):
    lengths = []
    for changes in ({"max_turns": 1}, {"max_turns": 3}, {"max_turns": 100}):
        made = worker(tiny_model, tiny_tokenizer, Echo, **changes)
        (load,) = made.evaluator._workloads(made.source.at(0))
        lengths.append(load.prompt)
    assert lengths[1] - lengths[0] == 2 * (6 + MESSAGE_TOKENS)
    assert lengths[2] == 512, "a conversation that gets longer than max_length is over"
