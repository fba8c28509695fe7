"""A small language model as the judge, behind the local server."""

import threading

import pytest
from judge_server import judging

from eggroll.errors import ModelError
from eggroll.llm.models import loading
from eggroll.llm.rewards import JudgeReward
from eggroll.llm.rewards.base import Unscored


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_grades_answers(monkeypatch, tmp_path):
    """It is no good judge, but one, where the server makes it begin as the schema says."""
    try:
        loaded = loading.load("smollm2-135m", dtype="float32")
    except ModelError as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    monkeypatch.setenv("EGGROLL_CACHE_DIR", str(tmp_path))
    busy, begun = threading.Lock(), '{"reason": "it is right or wrong", "score": '

    def behave(body):
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["reason", "score"]
        text = loaded.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        inputs = loaded.tokenizer(text + begun, return_tensors="pt", add_special_tokens=False)
        with busy:
            made = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return begun + loaded.tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    with judging(behave) as server:
        reward = JudgeReward(server.url, "smollm2-135m", criteria="The answer is right.", timeout=300)
        asked = ["What is the capital of France?"] * 3
        answers = ["The capital of France is Paris.", "Blue.", ""]
        scores = reward.score(asked, answers)
        graded = [score for score in scores if not isinstance(score, Unscored)]
        assert graded
        assert all(0 <= score <= 1 for score in graded)
        count = len(server.requests)
        assert [s for s in reward.score(asked, answers) if not isinstance(s, Unscored)] == graded
        assert len(server.requests) == count + len(scores) - len(graded)
