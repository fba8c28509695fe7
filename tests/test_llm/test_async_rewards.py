"""``async`` rewards: one event loop for all batches and rewards, and Ctrl-C cancels what is running."""

import asyncio
import os
import signal
import threading
import time

import pytest

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.errors import RewardError
from eggroll.llm.rewards import CustomReward, FunctionReward, Reward, TextReward, load_reward

FILE = """
import asyncio

limit = asyncio.Semaphore(2)
most = running = 0

async def score(text):
    global most, running
    async with limit:
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
    return float(len(text))
"""


def test_a_semaphore_of_a_file_survives_generations_and_is_shared(tmp_path, tiny_model, tiny_tokenizer):
    (tmp_path / "score.py").write_text(FILE)
    reward = load_reward(str(tmp_path / "score.py"), tiny_tokenizer)
    config = EggrollConfig(population_size=6, rank=1, generations=3, max_tokens=2, prompts_per_generation=2)
    trainer = EggrollTrainer(tiny_model, config, reward, tiny_tokenizer)
    history = trainer.evolve(["a", "b"], eval_data=["c"])
    assert [line["invalid_scores"] for line in history] == [0, 0, 0]
    assert reward.score(["p"] * 5, ["", "x", "xx", "xxx", "y"]) == [0.0, 1.0, 2.0, 3.0, 1.0]
    assert reward.scorer.__globals__["most"] == 2  # side by side, as many as the semaphore lets in


def test_rewards_of_all_kinds_share_one_loop():
    lock, loops = asyncio.Lock(), []

    async def kept(*_, **__):
        async with lock:
            await asyncio.sleep(0.001)
            loops.append(asyncio.get_running_loop())
        return 1.0

    async def batch(completions):
        return [await kept() for _ in completions]

    class Own(Reward):
        async def score(self, prompts, completions, columns=None):
            return await batch(completions)

    for _ in range(2):
        assert FunctionReward([batch, batch]).score(["p", "p"], ["a", "b"]) == [2.0, 2.0]
        assert TextReward(scorer=kept).score(["p", "p"], ["a", "b"]) == [1.0, 1.0]
        assert CustomReward(kept).evaluate(None, None) == 1.0
    assert len(set(loops)) == 1


def test_a_reward_class_with_an_async_score(tiny_model, tiny_tokenizer):
    class Own(Reward):
        async def score(self, prompts, completions, columns=None):
            await asyncio.sleep(0)
            return [float(len(text)) for text in completions]

    config = EggrollConfig(population_size=4, rank=1, generations=1, max_tokens=2)
    assert EggrollTrainer(tiny_model, config, Own(), tiny_tokenizer).evolve(["a"])[0]["invalid_scores"] == 0


def test_an_async_score_that_raises_names_its_prompt_and_leaves_the_loop_alive():
    async def score(text):
        if text == "bad":
            raise KeyError("answer")
        return 1.0

    with pytest.raises(RewardError, match=r"reward 'score', prompt 'q', raised KeyError: 'answer'"):
        TextReward(scorer=score).score(["p", "q"], ["fine", "bad"])
    assert TextReward(scorer=score).score(["p"], ["fine"]) == [1.0]


def test_a_task_that_leaves_the_program_does_not_stop_the_loop():
    async def leave():
        raise SystemExit(3)

    async def reward(completions):
        return await asyncio.gather(*(leave() for _ in completions))

    with pytest.raises(RewardError, match=r"ended the program with sys.exit\(\), exit\(\) or quit\(\) \(3\)"):
        FunctionReward(reward).score(["p"], ["x"])

    async def fine(completions):
        return [1.0] * len(completions)

    assert FunctionReward(fine).score(["p"], ["x"]) == [1.0]


def test_coroutines_that_are_not_run_are_closed(recwarn):
    async def slow(completions):
        return [1.0]

    def fails(completions):
        raise ValueError("no")

    with pytest.raises(RewardError, match="no"):
        FunctionReward([slow, fails]).score(["p"], ["x"])
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


@pytest.mark.parametrize("kind", ["async", "blocking"])
def test_ctrl_c_does_not_wait_for_the_reward(kind):
    ended = threading.Event()

    async def slow(completions):
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(20) if kind == "async" else time.sleep(2)
        finally:
            ended.set()
        return [1.0]

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        FunctionReward(slow).score(["p"], ["x"])
    assert time.monotonic() - began < 1.8
    assert ended.wait(5), "the coroutine was not cancelled"
