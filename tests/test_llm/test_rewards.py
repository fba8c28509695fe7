"""Text, function, custom and mixed rewards: what they are called with, and what wrong answers are told."""

import asyncio
import math
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from eggroll.errors import RewardError
from eggroll.llm.rewards import CustomReward, FunctionReward, MultiReward, PerplexityReward, Reward, TextReward

USER = [{"role": "user", "content": "hi"}]


def error_of(call):
    with pytest.raises(RewardError) as info:
        call()
    return info.value


class TestTextReward:
    def test_one_score_per_completion(self):
        reward = TextReward(scorer=len)
        assert reward.score(["p", "q"], ["a", "bcd"]) == [1.0, 3.0]
        assert (reward.name, reward.needs) == ("len", "text")
        assert reward.parts == [(reward, 1.0)]

    def test_forms_of_the_constructor(self, tiny_tokenizer):
        scorer = float
        for reward in (
            TextReward(tiny_tokenizer, scorer=scorer),
            TextReward(tiny_tokenizer, scorer),
            TextReward(scorer=scorer),
            TextReward(scorer),
        ):
            assert reward.score(["p"], ["2.5"]) == [2.5]

    def test_further_parameters_are_columns(self):
        def scorer(text, prompt, answer, bonus=0.5):
            return (text == answer) + len(prompt) + bonus

        assert TextReward(scorer=scorer).score(["p", "qq"], ["4", "5"], {"answer": ["4", "4"]}) == [2.5, 2.5]

    def test_double_star_takes_all_columns(self):
        seen = []
        reward = TextReward(scorer=lambda text, **columns: seen.append(columns) or 0)
        reward.score(["p"], ["x"], {"a": [1], "b": [2]})
        assert seen == [{"a": 1, "b": 2, "prompt": "p"}]

    def test_the_functions_own_parameter_wins_over_a_column_of_its_name(self):
        def score(completion, **columns):
            return len(completion) + len(columns)

        columns = {"completion": ["a reference"], "answer": ["4"]}
        assert TextReward(scorer=score).score(["p"], ["abc"], columns) == [5.0]

        class Scorer:
            def __call__(self, prompt, **columns):
                return {"right": 1.0}[prompt] + len(columns)

        assert TextReward(scorer=Scorer()).score(["p"], ["right"], {"answer": ["4"]}) == [2.0]

    def test_a_column_may_have_the_name_of_a_parameter_that_takes_no_keyword(self):
        def score(text, /, **columns):
            return len(text) + len(columns["text"])

        assert TextReward(scorer=score).score(["p"], ["abc"], {"text": ["four"]}) == [7.0]

    def test_none_and_nan_pass_as_nan(self):
        reward = TextReward(scorer={"a": None, "b": math.nan, "c": np.float32(2), "d": True}.get)
        scores = reward.score(["p"] * 4, list("abcd"))
        assert [math.isnan(score) for score in scores] == [True, True, False, False]
        assert scores[2:] == [2.0, 1.0]

    def test_scorer_that_raises(self):
        error = error_of(lambda: TextReward(scorer=lambda text: 1 / 0, name="broken").score(["the prompt"], ["x"]))
        assert str(error).startswith(
            "reward 'broken', prompt 'the prompt', raised ZeroDivisionError: division by zero."
        )
        assert isinstance(error.__cause__, ZeroDivisionError)

    def test_missing_column_is_named(self):
        def scorer(text, answer):
            return 0

        error = error_of(lambda: TextReward(scorer=scorer).score(["p"], ["x"], {"target": [1]}))
        assert "It asks for answer; the data set has prompt, target" in str(error)

    def test_not_a_number(self):
        error = error_of(lambda: TextReward(scorer=lambda text: "good", name="s").score(["p"], ["x"]))
        assert str(error) == "reward 's', prompt 'p', returned the text 'good'; a score must be a number"
        error = error_of(lambda: TextReward(scorer=lambda text: [1, 2], name="s").score([USER], ["x"]))
        assert str(error) == "reward 's', prompt 'hi', returned list [1, 2]; a score must be a number"

    def test_no_scorer(self, tiny_tokenizer):
        error = error_of(lambda: TextReward(tiny_tokenizer))
        assert "Write TextReward(tokenizer, scorer=my_function)" in str(error)


class TestFunctionReward:
    def test_called_as_trl_calls_it(self):
        seen = {}

        def reward(prompts, completions, **columns):
            seen.update(prompts=prompts, completions=completions, columns=columns)
            return [0.0, 1.0]

        columns = {"answer": [1, 2], "completion": ["x", "x"], "prompt": ["?", "?"]}
        assert FunctionReward(reward).score(["a", "b"], ["x", "y"], columns) == [0.0, 1.0]
        own = {name: seen["columns"].pop(name) for name in ("trainer_state", "log_extra", "log_metric")}
        assert own["trainer_state"].global_step == 0
        assert seen == {"prompts": ["a", "b"], "completions": ["x", "y"], "columns": {"answer": [1, 2]}}

    def test_conversations(self):
        def reward(completions, **kwargs):
            return [float(len(completion[0]["content"])) for completion in completions]

        assert FunctionReward(reward).score([USER, USER], ["abc", ""]) == [3.0, 0.0]

    def test_without_double_star_only_named_columns_are_passed(self):
        def reward(completions, answer, weight=2.0):
            return [weight * (c == a) for c, a in zip(completions, answer, strict=True)]

        assert FunctionReward(reward).score(["p"], ["4"], {"answer": ["4"], "level": [1]}) == [2.0]

    def test_outputs_and_prompts(self):
        def reward_fn(outputs: list[str], prompts: list[str]) -> list[float]:
            return [1.0 if "correct" in o else 0.0 for o in outputs]

        assert FunctionReward(reward_fn).score(["a", "b"], ["correct", "no"]) == [1.0, 0.0]

    def test_several_functions_with_weights(self):
        def length(completions, **_):
            return [len(c) for c in completions]

        def constant(prompts, **_):
            return torch.ones(len(prompts))

        reward = FunctionReward([length, constant], weights=[1.0, 10.0])
        assert reward.score(["p", "p"], ["a", "bb"]) == [11.0, 12.0]
        assert reward.name == "length+constant"
        assert FunctionReward([length, constant]).score(["p"], ["a"]) == [2.0]

    def test_none_means_not_applicable_and_nan_means_bad(self):
        def math_reward(completions, task, **_):
            return [1.0 if t == "math" else None for t in task]

        def code_reward(completions, task, **_):
            return [{"code": 2.0, "broken": math.nan}.get(t) for t in task]

        scores = FunctionReward([math_reward, code_reward]).score(
            ["p"] * 4, ["c"] * 4, {"task": ["math", "code", "poem", "broken"]}
        )
        assert scores[:2] == [1.0, 2.0]
        assert math.isnan(scores[2])
        assert math.isnan(scores[3])

    def test_async_functions_also_within_a_running_loop(self):
        async def slow(prompts, completions, **_):
            await asyncio.sleep(0.001)
            return [1.0] * len(completions)

        def fast(completions, **_):
            return [0.5] * len(completions)

        reward = FunctionReward([slow, fast, slow])
        assert reward.score(["p"], ["c"]) == [2.5]

        async def notebook():
            return reward.score(["p"], ["c"])

        assert asyncio.run(notebook()) == [2.5]

    def test_async_function_that_raises(self):
        async def slow(completions, **_):
            raise KeyError("answer")

        error = error_of(lambda: FunctionReward(slow).score(["p"], ["c"]))
        assert "reward function 'slow' raised KeyError: 'answer'" in str(error)
        assert isinstance(error.__cause__, KeyError)

    def test_token_ids(self, tiny_tokenizer):
        def reward(completions_ids, **_):
            return [len(ids) for ids in completions_ids]

        assert FunctionReward(reward, tokenizer=tiny_tokenizer).score(["p"], ["abcd"]) == [4.0]
        error = error_of(lambda: FunctionReward(reward).score(["p"], ["abcd"]))
        assert "asks for token ids; give FunctionReward the tokenizer" in str(error)

    def test_function_that_raises(self):
        def reward(completions, **_):
            raise ValueError("no way")

        error = error_of(lambda: FunctionReward(reward).score(["first", "second"], ["x", "y"]))
        assert str(error) == (
            "reward function 'reward' raised ValueError: no way "
            "(on a batch of 2 completions; the first prompt is 'first')"
        )
        assert isinstance(error.__cause__, ValueError)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([1.0], "returned 1 scores for 2 completions; it must return one for each"),
            (1.0, "returned float 1.0; it must return a list of 2 numbers"),
            ("ab", "returned str 'ab'; it must return a list of 2 numbers"),
            ([1.0, "x"], "returned the text 'x'; a score must be a number"),
            ([1.0, [2]], "returned list [2]; a score must be a number"),
            (None, "returned NoneType None; it must return a list of 2 numbers"),
        ],
    )
    def test_wrong_results(self, value, message):
        error = error_of(lambda: FunctionReward(lambda completions: value).score(["p", "q"], ["x", "y"]))
        assert str(error) == f"reward function '<lambda>' {message}"

    def test_missing_column(self):
        def reward(completions, answer):
            return [0.0]

        error = error_of(lambda: FunctionReward(reward).score(["p"], ["x"], {"target": [1]}))
        assert str(error).startswith(
            "reward function 'reward' asks for answer; there are target, prompts, completions."
        )

    def test_wrong_constructor(self):
        assert "needs one or several functions, got []" in str(error_of(lambda: FunctionReward([])))
        assert "got 2 weights for 1 functions" in str(error_of(lambda: FunctionReward(len, weights=[1, 2])))


def leave(*_, **__):
    quit(3)


def exit_silently(*_, **__):
    raise SystemExit


def cancel(*_, **__):
    raise asyncio.CancelledError("by the server")


async def leave_later(completions, **_):
    await asyncio.sleep(0)
    sys.exit("no key")


async def cancel_later(completions, **_):
    raise asyncio.CancelledError


def generate_and_leave(completions, **_):
    yield 1.0
    sys.exit()


class TestCodeThatEndsTheProgram:
    """``quit()`` in a reward ended a run with exit code 0, no model and no message."""

    ENDED = "ended the program with sys.exit(), exit() or quit()"

    @pytest.mark.parametrize("function", [leave, leave_later, generate_and_leave, exit_silently])
    def test_batch_functions(self, function):
        error = error_of(lambda: FunctionReward(function).score(["a", "b"], ["x", "y"]))
        assert str(error).startswith(f"reward function {function.__name__!r} {self.ENDED}")
        assert "; a reward must return a score" in str(error)
        assert isinstance(error.__cause__, SystemExit)

    def test_what_it_said_is_shown(self):
        assert "quit() (3); a reward" in str(error_of(lambda: FunctionReward(leave).score(["a"], ["x"])))
        assert "quit() (no key); a reward" in str(error_of(lambda: FunctionReward(leave_later).score(["a"], ["x"])))

    def test_other_rewards(self):
        error = error_of(lambda: TextReward(scorer=leave).score(["the prompt"], ["x"]))
        assert str(error).startswith(f"reward 'leave', prompt 'the prompt', {self.ENDED} (3); a reward must")
        error = error_of(lambda: CustomReward(leave).evaluate(None, None))
        assert str(error).startswith(f"reward 'leave' {self.ENDED} (3)")

    @pytest.mark.parametrize("function", [cancel, cancel_later])
    def test_other_exceptions_that_are_no_exception(self, function):
        error = error_of(lambda: FunctionReward(function).score(["a"], ["x"]))
        assert f"reward function {function.__name__!r} raised CancelledError" in str(error)

    def test_ctrl_c_passes(self):
        def interrupted(text):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            TextReward(scorer=interrupted).score(["a"], ["x"])


@pytest.mark.parametrize("one", [np.array([1.0]), np.array([[1]]), np.array(1.0), torch.tensor([1.0]), np.float16(1)])
def test_an_array_of_one_number_is_a_score(one):
    assert TextReward(scorer=lambda text: one).score(["p"], ["x"]) == [1.0]
    assert FunctionReward(lambda completions: [one]).score(["p"], ["x"]) == [1.0]
    assert CustomReward(lambda model, inputs: one).evaluate(None, None) == 1.0


@pytest.mark.parametrize("scores", [np.array([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]), iter([1.0, 2.0])])
def test_scores_in_a_column(scores):
    assert FunctionReward(lambda completions: scores).score(["p", "q"], ["x", "y"]) == [1.0, 2.0]


def test_an_array_without_axes_is_one_score():
    reward = FunctionReward(lambda completions: np.array(1.0))
    assert reward.score(["p"], ["x"]) == [1.0]
    assert "returned 1 scores for 2 completions" in str(error_of(lambda: reward.score(["p", "q"], ["x", "y"])))


class Hostile:
    """A number of the user's own that raises."""

    def __float__(self):
        raise ZeroDivisionError

    def __repr__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (10**400, "returned a number that is too large for a float; a score must fit one"),
        (Fraction(10**5000), "returned a number that is too large for a float; a score must fit one"),
        (np.array([1.0, 2.0]), "returned ndarray array([1., 2.]); a score must be a number"),
        (np.array([]), "returned ndarray array([], dtype=float64); a score must be a number"),
        (1j, "returned complex 1j; a score must be a number"),
        ([10**5000], "returned a list that cannot be shown; a score must be a number"),
        (Hostile(), "returned a Hostile that cannot be shown; a score must be a number"),
    ],
    ids=["int", "fraction", "two", "none", "complex", "list", "hostile"],
)
def test_values_that_are_no_score(value, message):
    error = error_of(lambda: FunctionReward(lambda completions: [value]).score(["p"], ["x"]))
    assert str(error) == f"reward function '<lambda>' {message}"
    assert str(error_of(lambda: TextReward(scorer=lambda text: value).score(["p"], ["x"]))).endswith(message)


class TestCustomReward:
    def test_value(self, tiny_model):
        reward = CustomReward(lambda model, inputs: -model(**inputs).loss)
        ids = torch.ones(1, 3, dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": ids}
        assert reward.evaluate(tiny_model, inputs) == pytest.approx(-tiny_model(**inputs).loss.item())
        assert reward.needs == "model"

    def test_errors(self):
        error = error_of(lambda: CustomReward(lambda model, inputs: inputs["x"], name="c").evaluate(None, {}))
        assert str(error) == "reward 'c' raised KeyError: 'x'"
        assert isinstance(error.__cause__, KeyError)
        error = error_of(lambda: CustomReward(lambda model, inputs: torch.ones(2), name="c").evaluate(None, {}))
        assert "reward 'c' returned Tensor tensor([1., 1.]); a score must be a number" in str(error)
        assert "CustomReward needs a function of (model, inputs)" in str(error_of(lambda: CustomReward(3)))
        assert math.isnan(CustomReward(lambda model, inputs: None).evaluate(None, {}))


class TestMultiReward:
    def test_text_rewards(self):
        inner = MultiReward([(TextReward(scorer=len), 1.0), (TextReward(scorer=lambda text: 1.0), 2.0)])
        reward = MultiReward([(inner, 0.5), (FunctionReward(lambda completions: [10.0] * len(completions)), 0.1)])
        assert reward.needs == "text"
        assert reward.score(["p", "p"], ["ab", ""]) == [pytest.approx(3.0), pytest.approx(2.0)]
        assert [weight for _, weight in reward.parts] == [0.5, 1.0, 0.1]

    def test_mixture_of_kinds(self, tiny_tokenizer):
        perplexity, text = PerplexityReward(tiny_tokenizer), TextReward(tiny_tokenizer, len)
        reward = MultiReward([(perplexity, 0.3), (text, 0.7)])
        assert reward.needs == "mixed"
        assert reward.parts == [(perplexity, 0.3), (text, 0.7)]
        assert reward.name == "0.3 perplexity + 0.7 len"
        assert "needs 'mixed' and has no score; use parts" in str(error_of(lambda: reward.score(["p"], ["x"])))

    def test_token_and_model_rewards(self, tiny_model, tiny_tokenizer):
        perplexity = PerplexityReward(tiny_tokenizer)
        batch = perplexity.encode(["abc", "de"])
        reward = MultiReward([(perplexity, 0.5), (perplexity, 1.5)])
        with torch.no_grad():
            found = reward.log_likelihood(tiny_model, batch)
            torch.testing.assert_close(found, 2 * perplexity.log_likelihood(tiny_model, batch))
        constant = CustomReward(lambda model, inputs: 3.0)
        assert MultiReward([(constant, 2.0), (constant, -1.0)]).evaluate(None, None) == 3.0

    def test_nan_is_not_hidden(self):
        reward = MultiReward([(TextReward(scorer=lambda text: None), 1.0), (TextReward(scorer=len), 1.0)])
        assert math.isnan(reward.score(["p"], ["x"])[0])

    def test_wrong_constructor(self):
        assert "MultiReward takes pairs of a reward and its weight" in str(error_of(lambda: MultiReward([len])))
        assert "needs at least one pair" in str(error_of(lambda: MultiReward([])))
        error = error_of(lambda: MultiReward([(TextReward(scorer=len), math.inf)]))
        assert str(error) == "the weight of 'len' (=inf) must be finite"


def test_wrong_method_names_the_right_one():
    message = "reward 'len' needs 'text' and has no log_likelihood; use score"
    with pytest.raises(RewardError, match=re.escape(message)):
        TextReward(scorer=len).log_likelihood(None, None)
    assert "needs 'model' and has no score; use evaluate" in str(
        error_of(lambda: CustomReward(lambda model, inputs: 0.0).score([], []))
    )
    assert isinstance(TextReward(scorer=len), Reward)
