"""eggroll eval, end to end with a tiny model: figures, comparison, progress, errors."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from eggroll.cli.eval import EvalOptions, _Bar, _verdict
from eggroll.errors import ConfigError
from eggroll.llm.measure.evaluate import Result, compare, draw_problems, ks_of, pass_at
from eggroll.llm.measure.evaluate import evaluate as answer
from eggroll.llm.models.loading import LoadedModel
from eggroll.llm.tasks import get_task

ZEROS = ["--task", "zeros", "--problems", "12", "--max-tokens", "4", "--dtype", "float32"]


@pytest.fixture
def other(eggroll, model_dir):
    """The same model with one matrix changed, in ``other/``."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(eggroll.work / "other")
    transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(eggroll.work / "other")
    return "other"


def test_one_model(eggroll):
    done = eggroll("eval", "tiny", *ZEROS, "--batch-size", "5", "-o", "eval.json")
    assert done.status == 0, done.err
    assert "zeros  Write nothing but zeros (for debugging). 12 test problems, 4 tokens at most, seed 42" in done.out
    assert "tiny: 5 of 12, " in done.out
    assert "tiny: 12 of 12, " in done.out
    assert "95 % intervals in brackets" in done.out
    assert "difference" not in done.out
    assert "\x1b" not in done.out
    found = json.loads((eggroll.work / "eval.json").read_text())
    assert found["task"] == "zeros"
    assert found["split"] == "test"
    assert found["difference"] is None
    assert found["settings"]["max_tokens"] == 4
    assert found["settings"]["dtype"] == "float32"
    (model,) = found["models"]
    rewards = [row["answers"][0]["reward"] for row in found["problems"]]
    assert len(rewards) == 12
    assert model["mean_reward"]["value"] == pytest.approx(sum(rewards) / 12)
    assert model["right"] == sum(reward >= 1 for reward in rewards)
    for figure in ("accuracy", "mean_reward"):
        assert model[figure]["low"] <= model[figure]["value"] <= model[figure]["high"]
    prompts = {row["prompt"] for row in get_task("zeros").test}
    assert {row["prompt"] for row in found["problems"]} <= prompts


def test_worked_examples_come_before_each_problem(eggroll):
    given = ["--task", "countdown", "--shots", "1", "--problems", "3", "--max-tokens", "2", "--dtype", "float32"]
    done = eggroll("eval", "tiny", *given, "-o", "eval.json")
    assert done.status == 0, done.err
    found = json.loads((eggroll.work / "eval.json").read_text())
    assert found["shots"] == 1
    assert all(row["prompt"].startswith("Numbers: ") for row in found["problems"])


def test_the_seed_chooses_the_problems_and_batches_change_nothing(eggroll):
    for name, extra in (("a", ["--batch-size", "3"]), ("b", ["--batch-size", "12"]), ("c", ["--seed", "7"])):
        assert eggroll("eval", "tiny", *ZEROS, *extra, "-o", f"{name}.json").status == 0
    a, b, c = (json.loads((eggroll.work / f"{name}.json").read_text())["problems"] for name in "abc")
    assert a == b
    assert [row["prompt"] for row in a] != [row["prompt"] for row in c]


def test_two_models(eggroll, other):
    done = eggroll("eval", "tiny", other, *ZEROS, "-o", "eval.json")
    assert done.status == 0, done.err
    assert "McNemar" in done.out
    found = json.loads((eggroll.work / "eval.json").read_text())
    before, after = ([row["answers"][i]["reward"] for row in found["problems"]] for i in (0, 1))
    assert [row["model"] for row in found["models"]] == ["tiny", "other"]
    assert found["difference"]["mean"]["value"] == pytest.approx((sum(after) - sum(before)) / 12)
    texts = [[row["answers"][i]["completion"] for row in found["problems"]] for i in (0, 1)]
    assert texts[0] != texts[1]


def test_a_model_against_itself(eggroll):
    done = eggroll("eval", "tiny", "tiny", "--task", "one_sentence", "--problems", "4", "--max-tokens", "2",
                   "--dtype", "float32", "-o", "eval.json")  # fmt: skip
    assert done.status == 0, done.err
    difference = json.loads((eggroll.work / "eval.json").read_text())["difference"]
    assert difference["mean"]["value"] == difference["gained"] == difference["lost"] == 0
    assert difference["p_value"] == 1
    assert difference["mean"]["low"] < 0 < difference["mean"]["high"]
    assert "too few problems to tell: with 4 problems, even 4 gained and none lost would show nothing" in done.out
    assert "(p = 0.125, McNemar, exact); --problems 96 would tell more" in done.out


def test_sampled_answers_repeat(eggroll):
    for name in ("a", "b"):
        assert eggroll("eval", "tiny", *ZEROS, "--temperature", "1", "-o", f"{name}.json").status == 0
    a, b = (json.loads((eggroll.work / f"{name}.json").read_text())["problems"] for name in "ab")
    assert a == b
    assert len({row["answers"][0]["completion"] for row in a}) > 6


def test_several_answers_to_each_problem(eggroll, other):
    given = ["--task", "zeros", "--problems", "6", "--samples", "5", "--temperature", "1", "--max-tokens", "3",
             "--dtype", "float32"]  # fmt: skip
    done = eggroll("eval", "tiny", other, *given, "-o", "eval.json")
    assert done.status == 0, done.err
    assert "6 test problems, 5 answers to each, 3 tokens at most" in done.out
    assert "tiny: 30 of 30" in done.out
    assert "pass@k: problems solved by at least one of k answers, from 5 to each (solved: a score of 1)" in done.out
    found = json.loads((eggroll.work / "eval.json").read_text())
    assert found["samples"] == 5
    assert len(found["problems"]) == 6
    assert all(len(row["answers"]) == 10 for row in found["problems"])
    for model in found["models"]:
        assert [*model["pass_at"]] == ["1", "2", "4", "5"]
        assert model["pass_at"]["1"] == model["accuracy"]
    texts = {answer["completion"] for row in found["problems"] for answer in row["answers"]}
    assert len(texts) > 20
    alone = eggroll("eval", "tiny", *given, "-o", "alone.json")
    assert alone.status == 0
    rows = json.loads((eggroll.work / "alone.json").read_text())["problems"]
    assert [row["answers"] for row in rows] == [row["answers"][:5] for row in found["problems"]]


def test_pass_at_k():
    """The estimate is the mean over all choices of k answers, and its interval is over problems."""
    right = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    counts = np.array(right).sum(axis=1)
    for k in range(1, 6):
        wanted = [np.mean([max(chosen) for chosen in combinations(row, k)]) for row in right]
        assert pass_at(counts, 5, k) == pytest.approx(wanted)
    with pytest.raises(ConfigError, match=r"k \(=6\) of pass@k must be from 1 to 5, the answers to each problem"):
        pass_at(counts, 5, 6)
    assert ks_of(1) == [1]
    assert ks_of(5) == [1, 2, 4, 5]
    assert ks_of(8) == [1, 2, 4, 8]
    result = Result([float(score) * 1.1 for row in right for score in row], ["a"] * 20, samples=5)
    assert (result.problems, result.right) == (4, 8)
    assert result.accuracy().value == pytest.approx(0.4)
    assert result.pass_at(5).method == "Wilson"
    assert result.pass_at(2).method == "Wilson, of the range"
    task = get_task("countdown")
    change = compare(result, Result([1.1] * 20, ["a"] * 20, samples=5), task, seed=0)
    assert (change.gained, change.lost) == (3, 0)
    assert {k: round(change.passes[k].value, 3) for k in (1, 5)} == {1: 0.6, 5: 0.25}
    assert change.mean.value == pytest.approx(0.66)


def test_pass_at_k_is_right_on_average():
    """Of problems with a known chance, drawn again and again: no bias, also for k close to n."""
    rng = np.random.default_rng(0)
    chance = np.array([0.1, 0.3, 0.8])
    counts = rng.binomial(6, chance, size=(20_000, 3))
    for k in (1, 3, 6):
        found = pass_at(counts.ravel(), 6, k).reshape(counts.shape).mean(axis=0)
        assert found == pytest.approx(1 - (1 - chance) ** k, abs=0.01)


class Scripted:
    """A tokenizer's decoding in the place of a model's: answers that are known."""

    def __init__(self, texts):
        self.texts = iter(texts)

    def __call__(self, *_, **__):
        return [next(self.texts)], 3


def test_right_answers_are_counted(model_dir, monkeypatch):
    from eggroll.llm.backends.torch import TorchEvaluator

    task = get_task("countdown")
    problems = draw_problems(task, 4, 0)
    right = [f"<think>.</think> <answer>{p.columns['solution']}</answer>" for p in problems]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    loaded = LoadedModel(model, tokenizer, "tiny", "tiny", torch.float32, torch.device("cpu"))
    config = EvalOptions(models=("tiny",), task="countdown").config(task)
    results = []
    for texts in ([right[0], "no", "no", "<answer>1</answer>"], right):
        monkeypatch.setattr(TorchEvaluator, "complete", Scripted(texts))
        seen = []
        results.append(
            answer(
                loaded, task, problems, config, batch_size=1, listener=lambda r, seen=seen: seen.append(len(r.scores))
            )
        )
        assert seen == [1, 2, 3, 4]
    before, after = results
    assert before.scores == pytest.approx([1.1, 0, 0, 0.05])
    assert after.scores == pytest.approx([1.1] * 4)
    assert (before.right, after.right, after.tokens) == (1, 4, 12)
    change = compare(before, after, task, seed=0)
    assert (change.gained, change.lost) == (3, 0)
    assert change.accuracy.value == pytest.approx(0.75)
    assert change.mean.value == pytest.approx(0.8125)


def test_scores_of_zero_and_one_have_a_proportions_interval():
    task = get_task("zeros")
    assert Result([0.0, 1.0, 1.0], ["a"] * 3).mean(task, seed=0).method == "Wilson"
    assert Result([0.0, 0.5, 1.0], ["a"] * 3).mean(task, seed=0).method == "Wilson, of the range"
    assert Result([0.0, 0.5, 1.0] * 6, ["a"] * 18).mean(task, seed=0).method == "bootstrap (BCa)"
    # a score of 0 everywhere says less where 1.1 is possible
    none = Result([0.0] * 8, ["a"] * 8)
    assert none.mean(get_task("countdown"), seed=0).high == pytest.approx(1.1 * none.accuracy().high)


def test_words_for_few_and_for_many_problems():
    task = get_task("countdown")

    def words(before, after):
        results = [Result(scores, ["a"] * len(scores)) for scores in (before, after)]
        return " | ".join(_verdict(len(before), 1024, compare(*results, task, seed=0)))

    assert _verdict(128, 1024, None) == []
    assert _verdict(1, 1024, None)[0].startswith("1 problem: too few for more than an impression")
    assert _verdict(1, 1, None)[0].endswith("intervals says")
    assert words([0.0] * 5, [1.1] * 5).startswith(
        "too few problems to tell: with 5 problems, even 5 gained and none lost would show nothing (p = 0.0625"
    )
    few = words([0.0, 0.1] * 5, [0.1, 0.0] * 5)
    assert few.startswith(
        "the interval of the mean reward's difference includes 0, so no difference is shown (with 10 "
    )
    assert few.endswith("10 problems: too few for more than an impression, as the width of the intervals says; "
                        "--problems 128 would tell more")  # fmt: skip
    many = words([0.0] * 64 + [1.1] * 64, [0.0] * 32 + [1.1] * 96)
    assert many == ("the interval of the mean reward's difference excludes 0; gained against lost: p = 4.66e-10 "
                    "(McNemar, exact)")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--task", "countdwn"], "there is no task 'countdwn'; did you mean countdown? The tasks are "),
        (["tiny", "--task", "zeros", "--problems", "9999"],
         "problems (=9999) must be from 1 to 64, the test problems of zeros"),
        (["tiny", "--task", "zeros", "--problems", "0"], "problems (=0) must be from 1 to 64"),
        (["tiny", "--task", "zeros", "--samples", "0"], "samples (=0) must be at least 1, the answers to each problem"),
        (["tiny", "--task", "zeros", "--samples", "8"],
         "samples (=8) are answers to each problem, which are all the same at temperature 0: add --temperature 0.7"),
        (["tiny", "tiny", "tiny", "--task", "zeros"], "eggroll eval: one model or two can be evaluated, not 3"),
        (["tiny", "--task", "zeros", "--batch-size", "0"], "eggroll eval: batch_size (=0) must be at least 1"),
        (["tiny", "--task", "zeros", "--max-tokens", "0"], "max_tokens (=0) must be a whole number of at least 1"),
        (["tiny", "--task", "zeros", "-o", "nowhere/eval.json"], "--output nowhere/eval.json: the directory "),
        (["tiny", "--task", "zeros", "-o", "tiny"], "--output tiny is a directory; give the name of a file in it"),
        (["./tinny", "--task", "zeros"], "model directory tinny does not exist"),
    ],
)  # fmt: skip
def test_errors(eggroll, arguments, message):
    done = eggroll("eval", *arguments)
    assert done.status == 1
    assert message in done.err


def test_no_model_is_an_error(eggroll):
    assert eggroll("eval", "--task", "zeros").status in (1, 2)
    assert eggroll("eval", "tiny").status == 2


def test_a_live_bar_on_a_terminal():
    console = Console(force_terminal=True, width=120)
    with console.capture() as shown, _Bar("m[odel]", 4, console) as bar:
        bar.show(Result([1.0, 0.0], ["a", "b"], tokens=8, seconds=2.0))
        bar.progress.refresh()
    assert "m[odel]" in shown.get()
    assert "1 right, mean 0.500, 4 tok/s" in shown.get()


def test_options_of_a_task():
    task = get_task("zeros")
    assert EvalOptions(models=("m",), task="zeros").config(task).max_tokens == 16
    assert EvalOptions(models=("m",), task="zeros", max_tokens=3, system="s").config(task).system == "s"
    with pytest.raises(ConfigError, match="has 2 problems"):
        EvalOptions(models=(), task="zeros", batch_size=0).config(task)


def test_tune_on_a_task(eggroll):
    task = "countdown"
    (eggroll.work / "held.jsonl").write_text(json.dumps(get_task(task).heldout[0]) + "\n")
    given = [
        "-g",
        "1",
        "-p",
        "2",
        "--max-tokens",
        "2",
        "--batch-size",
        "1",
        "--dtype",
        "float32",
        "--report-to",
        "none",
    ]
    done = eggroll("tune", "tiny", "--task", task, *given, "--eval-prompts", "held.jsonl", "-o", "run")
    assert done.status == 0, done.err
    assert f"reward {task}, {len(get_task(task).train)} prompts" in done.out
