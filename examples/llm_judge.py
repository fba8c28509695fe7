"""An LLM as the judge: each answer is graded by a model behind an HTTP interface.

    python examples/llm_judge.py     with the stand-in of judge_stub.py, two minutes on two cores
    JUDGE_URL=http://host:8000/v1 JUDGE_MODEL=name python examples/llm_judge.py     with a real one

The reward is asynchronous, so the answers of a generation are graded side by side: at most 16 at a time, over
connections that stay open. A grade that cannot be read counts as 0; a judge that fails ends the run with its error.
"""

import asyncio
import os
import re
import threading
from types import SimpleNamespace

import httpx
import judge_stub

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import load

TRAIN = ["What is rain?", "What do bees eat?", "How do planes fly?", "What is a hammer?"]
HELDOUT = ["What is snow?", "What do cows eat?", "How do birds fly?", "What is a saw?", "What does a baker do?"]
ASK = "Grade the answer from 0 to 10: is it right, short and a whole sentence? Reply with 'Grade: N'."


def judge(url: str, model: str, at_once: int = 16):
    """A reward in [0, 1] from the judge at ``url``."""
    client, free = httpx.AsyncClient(timeout=60), asyncio.Semaphore(at_once)

    async def grade(prompt: str, completion: str) -> float:
        content = f"{ASK}\n\nQuestion: {prompt}\nAnswer: {completion}"
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]}
        async with free:
            reply = await client.post(f"{url}/chat/completions", json=body)
        found = re.search(r"Grade:\s*(\d+)", reply.raise_for_status().json()["choices"][0]["message"]["content"])
        return min(int(found[1]), 10) / 10 if found else 0.0

    async def reward(prompts, completions, **columns):
        return await asyncio.gather(*(grade(p, c) for p, c in zip(prompts, completions, strict=True)))

    return reward


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the mean grade on held-out questions, before and after; at most 1."""
    url = os.environ.get("JUDGE_URL")
    if url is None:
        stub = judge_stub.server()
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{stub.server_port}/v1"
    loaded = load(model, dtype="float32")
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.004, generations=generations,
        prompts_per_generation=len(TRAIN), max_tokens=18, eval_every=5,
    )  # fmt: skip
    trainer = EggrollTrainer(loaded.model, config, judge(url, os.environ.get("JUDGE_MODEL", "judge")), loaded.tokenizer)
    curve: list[float] = []  # held-out grades: before, every five generations, after
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    trainer.evolve(TRAIN, eval_data=HELDOUT, listeners=[watch])
    print(f"grade on held-out questions: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
