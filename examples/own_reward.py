"""A reward of your own: a file with a function ``score``. Run it, or give it to the command line.

    python examples/own_reward.py            two minutes on two cores
    eggroll tune smollm2-135m -r examples/own_reward.py --prompts questions.txt

A small chat model rambles when it is asked a simple question. The score wants a short sentence that ends. It knows
nothing about the content: `eggroll tune smollm2-135m --task one_sentence` has a score that also wants right answers.
"""

from types import SimpleNamespace

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import load

TRAIN = ["What is rain?", "What do bees eat?", "How do planes fly?", "What is a hammer?"]
HELDOUT = ["What is snow?", "What do cows eat?", "How do birds fly?", "What is a saw?", "What does a baker do?"]


def score(text: str) -> float:
    """1.5 for six words and a full stop; 1/6 less for every word more or fewer, 1/2 less without the full stop."""
    return 1 - abs(len(text.split()) - 6) / 6 + 0.5 * text.strip().endswith(".")


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the score on held-out questions, before and after."""
    loaded = load(model, dtype="float32")
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.004, generations=generations,
        prompts_per_generation=len(TRAIN), max_tokens=18, eval_every=5,
    )  # fmt: skip
    trainer = EggrollTrainer(loaded.model, config, score, loaded.tokenizer)
    curve: list[float] = []  # held-out scores: before, every five generations, after
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    trainer.evolve(TRAIN, eval_data=HELDOUT, listeners=[watch])
    print(f"score on held-out questions: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
