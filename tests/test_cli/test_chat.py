"""``eggroll chat`` and ``eggroll generate`` with a tiny model: settings of the training, both models, what is typed."""

import io
import json
import shutil
import sys

import pytest
import torch
import transformers

from eggroll.cli import chat as command
from eggroll.cli import generate as generation
from eggroll.cli.asking import AskOptions, subjects
from eggroll.llm import load
from eggroll.llm.config import EggrollConfig
from eggroll.llm.data.examples import Example
from eggroll.llm.measure.answers import Conversation, Writer
from eggroll.run.run_dir import RunDir

SYSTEM = "Be brief."
STORED = {"model": "tiny", "dtype": "float32", "max_tokens": 6, "max_length": 90, "system": SYSTEM}


@pytest.fixture
def run(eggroll, model_dir):
    """A run directory ``run`` whose model is the tiny one with its output head turned around."""
    RunDir.create("run", {"kind": "tune", "options": STORED}, command=["eggroll"])
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained("run/model")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained("run/model")
    return "run"


@pytest.fixture
def typing(monkeypatch):
    """``typing("a", "b")``: a terminal on which these lines are typed, and then Ctrl-D."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def typed(*lines):
        rest = iter(lines)

        def read(prompt):
            assert prompt == "> "
            try:
                line = next(rest)
            except StopIteration:
                raise EOFError from None
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)

    return typed


class Echo:
    """In the place of :class:`Writer`: answers name the turns that were read."""

    converses = True
    longest = 3

    def __init__(self, *_):
        self.config = EggrollConfig(max_length=self.longest)
        self.read = []

    def length(self, turns):
        return len(turns)

    def write(self, batch, number):
        (example,) = batch
        self.read.append(example.prompt)
        return [f"{number}: {example.prompt[-1]['content'].upper()}"], 1


def writer(model, **settings):
    return Writer(load(model, dtype="float32"), EggrollConfig(**{"max_tokens": 6, "max_length": 90, **settings}))


def asked(model, question, **settings):
    return command.printable(writer(model, **settings).write([Example(question)], 0)[0][0].strip())


def test_a_run_answers_before_and_after_with_its_own_settings(eggroll, run):
    done = eggroll("chat", run, "-q", "What is red?")
    assert done.status == 0, done.err
    before, after = asked("tiny", "What is red?", system=SYSTEM), asked("run/model", "What is red?", system=SYSTEM)
    assert before != after
    assert before != asked("tiny", "What is red?")
    assert done.out == f"before  {before}\nafter   {after}\n"
    for only, wanted in (("before", before), ("after", after)):
        assert eggroll("chat", run, "-q", "What is red?", "--only", only).out == f"{wanted}\n"


def test_what_is_typed_counts_more_than_the_run(eggroll, run):
    given = ["-q", "What is red?", "--only", "before", "--system", "", "--max-tokens", "3"]
    assert eggroll("chat", run, *given).out == f"{asked('tiny', 'What is red?', max_tokens=3)}\n"
    sampled = [*given[:6], "--chat", "False", "--temperature", "2", "--seed"]
    found = [eggroll("chat", run, *sampled, seed).out for seed in ("7", "7", "8")]
    made = writer("tiny", chat=False, temperature=2.0, seed=7)
    assert found[0] == found[1] == command.printable(made.write([Example("What is red?")], 1)[0][0].strip()) + "\n"
    assert found[0] != found[2]


def test_a_saved_model_says_how_it_was_trained(eggroll, run):
    details = {"config": {"system": SYSTEM, "max_tokens": 6, "max_length": 90, "chat": "x", "temperature": True}}
    shutil.copytree("run/model", "saved")
    (eggroll.work / "saved/eggroll.json").write_text(json.dumps(details))
    found, config = subjects(AskOptions(model="saved"), "chat", ())
    assert [one.label for one in found] == ["saved"]
    assert (config.system, config.max_tokens, config.max_length, config.chat) == (SYSTEM, 6, 90, None)
    assert subjects(AskOptions(model="tiny"), "chat", ())[1].system is None


def test_each_line_of_standard_input_is_a_question_of_its_own(eggroll, run, monkeypatch):
    questions = ["What is red?", "Say hi."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(["", *questions, " "])))
    done = eggroll("chat", "tiny", "--dtype", "float32", "--max-tokens", "6")
    assert done.status == 0, done.err
    assert done.out == "".join(f"{asked('tiny', question)}\n" for question in questions)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions)))
    lines = eggroll("chat", run).out.splitlines()
    assert [line for line in lines if line.startswith("What") or line.startswith("Say")] == questions
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    done = eggroll("chat", "tiny")
    assert (done.status, done.out) == (1, "")
    assert done.err == ('error: there is no question: standard input has none, one a line. Give one with -q "..."\n')


def test_a_conversation_goes_on_until_it_is_renewed(eggroll, typing, monkeypatch):
    made = Echo()
    monkeypatch.setattr(command, "writer", lambda *_: made)
    typing("one", " two ", "", "/what", KeyboardInterrupt(), "/new", "three", "/exit", "never")
    done = eggroll("chat", "tiny")
    assert done.status == 0, done.err
    assert done.out == "1: ONE\n2: TWO\n3: THREE\n"
    roles = [[turn["content"] for turn in turns] for turns in made.read]
    assert roles == [["one"], ["one", "1: ONE", "two"], ["three"]]
    assert "tiny  greedy, at most 128 tokens an answer" in done.err
    assert "there is /new and /exit, and no /what" in done.err
    assert "a new conversation" in done.err


def test_the_oldest_turns_are_forgotten_first():
    conversation = Conversation(Echo())
    for number, question in enumerate(("one", "two", "three")):
        conversation.ask(question, number)
    assert [turn["content"] for turn in conversation.turns] == ["two", "1: TWO", "three", "2: THREE"]


def test_an_answer_that_is_stopped_is_no_part_of_the_conversation(eggroll, typing, monkeypatch):
    made = Echo()
    write = made.write

    def interrupted(batch, number):
        if number == 2:
            raise KeyboardInterrupt
        return write(batch, number)

    monkeypatch.setattr(made, "write", interrupted)
    monkeypatch.setattr(command, "writer", lambda *_: made)
    typing("one", "two", "three")
    done = eggroll("chat", "tiny")
    assert done.out == "1: ONE\n3: THREE\n"
    assert [turn["content"] for turn in made.read[-1]] == ["one", "1: ONE", "three"]
    assert "stopped; this question is not a part of the conversation" in done.err


def test_without_a_chat_template_each_question_stands_alone(model_dir):
    made = writer(str(model_dir), chat=False)
    conversation = Conversation(made)
    first = conversation.ask("What is red?", 1)
    assert conversation.turns == []
    assert conversation.ask("What is red?", 2) == first
    assert not made.converses


def test_a_conversation_is_read_as_the_template_writes_it(model_dir):
    made = writer(str(model_dir), system=SYSTEM)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = f"<|system|>{SYSTEM}<|end|><|user|>a<|end|><|assistant|>b<|end|><|user|>c<|end|><|assistant|>"
    assert made.length(turns) == len(made.tokenizer(text, add_special_tokens=False).input_ids)


def test_a_run_that_has_not_ended(eggroll, run):
    shutil.rmtree("run/model")
    done = eggroll("chat", run, "-q", "a")
    assert done.status == 1
    assert done.err == (
        "error: run has no model yet: it is written when the run ends. Rebuild the weights as they are now and ask "
        "these: eggroll replay run -o run/so-far && eggroll chat run/so-far; or ask the model that it started from: "
        "--only before\n"
    )
    assert eggroll("chat", run, "-q", "a", "--only", "before").status == 0


def test_a_run_whose_first_model_is_gone(eggroll, run):
    (eggroll.work / "tiny").unlink()
    done = eggroll("chat", run, "-q", "a")
    assert done.status == 1
    assert "model 'tiny' cannot be loaded" in done.err
    assert done.err.endswith("the run started from this model; to ask the trained one alone, add --only after\n")
    assert eggroll("chat", run, "-q", "a", "--only", "after").status == 0


def test_other_runs_and_models_without_a_before(eggroll):
    RunDir.create("policy", {"kind": "rl", "options": {}}, command=["eggroll"])
    done = eggroll("chat", "policy", "-q", "a")
    assert done.err == (
        "error: policy is a run of eggroll rl; eggroll chat asks a language model, or a run of eggroll tune\n"
    )
    done = eggroll("generate", "tiny", "prompts.txt", "--only", "before")
    assert done.err == (
        "error: --only before asks the model that a run started from, and tiny is not a run's directory\n"
    )


def test_a_run_that_is_not_there(eggroll):
    """What is missing is said first, before a question is asked for, and no hub is asked for a run's name."""
    RunDir.create("runs/policy", {"kind": "rl", "options": {}}, command=["eggroll"])
    for words in (("chat", "runs/polcy"), ("generate", "runs/polcy", "prompts.txt")):
        assert eggroll(*words).err == "error: runs/polcy does not exist. Runs in runs: policy\n"


def test_no_code_of_a_run_directory_is_run(eggroll):
    """The reward is not even looked at; a model's own code needs the user's word."""
    stored = {**STORED, "reward": "lambda text: open('ran', 'w')"}
    RunDir.create("sent", {"kind": "tune", "options": stored}, command=["eggroll"])
    assert eggroll("chat", "sent", "-q", "a", "--only", "before").status == 0
    RunDir.create("other", {"kind": "tune", "options": {**stored, "trust_remote_code": True}}, command=["eggroll"])
    done = eggroll("chat", "other", "-q", "a", "--only", "before")
    assert done.status == 1
    assert done.err == (
        "error: this run used --trust-remote-code, which runs code, and a run's directory is not trusted with that. If "
        "you trust the code, add --trust-remote-code: eggroll chat other --trust-remote-code\n"
    )
    assert not (eggroll.work / "ran").exists()


def test_completions_of_a_file(eggroll, run):
    rows = [{"prompt": "What is red?", "answer": [1]}, {"messages": [{"role": "user", "content": "Say hi."}]}]
    (eggroll.work / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for extra, model in (([], "run/model"), (["--only", "before"], "tiny")):
        done = eggroll("generate", run, "in.jsonl", "-o", "out.jsonl", "--batch-size", "1", *extra)
        assert (done.status, done.out) == (0, ""), done.err
        assert done.err.splitlines()[-1] == "2 completions in out.jsonl"
        first, second = map(json.loads, (eggroll.work / "out.jsonl").read_text().splitlines())
        made = writer(model, system=SYSTEM)
        assert first == {"prompt": "What is red?", "completion": made.write([Example("What is red?")], 0)[0][0],
                         "answer": [1]}  # fmt: skip
        assert second["prompt"] == rows[1]["messages"]
        assert second["completion"] == made.write([Example("Say hi.")], 1)[0][0]


def test_completions_on_standard_output_do_not_depend_on_batches(eggroll):
    found = []
    for size in ("1", "4", "16"):
        done = eggroll("generate", "tiny", "prompts.txt", "--dtype", "float32", "--max-tokens", "4",
                       "--batch-size", size)  # fmt: skip
        assert done.status == 0, done.err
        found.append([json.loads(line) for line in done.out.splitlines()])
    assert [row["prompt"] for row in found[0]] == (eggroll.work / "prompts.txt").read_text().splitlines()
    assert found[0] == found[1] == found[2]
    assert "tiny: 6 of 6" in done.err


def test_what_is_written_is_kept_when_it_is_interrupted(eggroll, monkeypatch):
    class Stopped(Echo):
        def write(self, batch, number):
            if number == 2:
                raise KeyboardInterrupt
            return [f"answer {number}"], 1

    monkeypatch.setattr(generation, "writer", lambda *_: Stopped())
    done = eggroll("generate", "tiny", "prompts.txt", "-o", "out.jsonl", "--batch-size", "1")
    assert done.status == 130
    assert "interrupted: 2 of 6 completions are in out.jsonl" in done.err
    rows = [json.loads(line) for line in (eggroll.work / "out.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == ["answer 0", "answer 1"]


def test_prompts_are_not_written_over(eggroll):
    before = (eggroll.work / "prompts.txt").read_text()
    done = eggroll("generate", "tiny", "./prompts.txt", "-o", "prompts.txt")
    assert done.err == (
        "error: --output prompts.txt is the file of the prompts, which would be lost; give another name\n"
    )
    assert (eggroll.work / "prompts.txt").read_text() == before


def test_two_answers_stand_side_by_side_on_a_terminal(capsys):
    chat = command._Chat.__new__(command._Chat)
    chat.asked = [command.Subject(label, label, "auto", "auto") for label in ("before", "after")]
    chat.console = command.Terminal(force_terminal=True, width=60)
    chat.show(["long \x1b[2J", "[bold]short[/]"])
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "long" in line]
    assert "long \ufffd[2J" in line
    assert "[bold]short[/]" in line
