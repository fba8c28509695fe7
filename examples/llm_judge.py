"""An LLM as the judge: each answer is graded by a model behind an OpenAI-compatible endpoint.

    python examples/llm_judge.py     with the stand-in of judge_stub.py, two minutes on two cores
    JUDGE_URL=http://host:8000/v1 JUDGE_MODEL=name python examples/llm_judge.py     with a real one

Answers are graded side by side, grades are kept on disk, and a judge that does not reply costs no member its score.
A server that wants a key gets the one in EGGROLL_JUDGE_KEY.
"""

import os
import threading
from types import SimpleNamespace

import judge_stub

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import JudgeReward, load

TRAIN = ["What is rain?", "What do bees eat?", "How do planes fly?", "What is a hammer?"]
HELDOUT = ["What is snow?", "What do cows eat?", "How do birds fly?", "What is a saw?", "What does a baker do?"]
CRITERIA = "The answer is right, short, and a whole sentence."


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the mean grade on held-out questions, before and after; at most 1."""
    url = os.environ.get("JUDGE_URL")
    if url is None:
        stub = judge_stub.server()
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{stub.server_port}/v1"
    judge = JudgeReward(url, os.environ.get("JUDGE_MODEL", "judge"), criteria=CRITERIA)
    loaded = load(model, dtype="float32")
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.004, generations=generations,
        prompts_per_generation=len(TRAIN), max_tokens=18, eval_every=5,
    )  # fmt: skip
    trainer = EggrollTrainer(loaded.model, config, judge, loaded.tokenizer)
    curve: list[float] = []  # held-out grades: before, every five generations, after
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    trainer.evolve(TRAIN, eval_data=HELDOUT, listeners=[watch])
    print(f"grade on held-out questions: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
