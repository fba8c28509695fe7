"""A world of your own: the model is asked, and asked again until its answer is short enough. Run it, or tune with it.

    python examples/quiz_world.py            five minutes on two cores
    eggroll tune smollm2-135m --world examples/quiz_world.py:Patience

The world knows the answer, wants it in at most three words, and has patience for three attempts. What is learned is to
listen: a model that says the same thing again loses, whatever it says.
"""

from types import SimpleNamespace
from typing import Any

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import Turn, World

FACTS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Spain": "Madrid", "Greece": "Athens",
    "Peru": "Lima", "Cuba": "Havana", "Russia": "Moscow", "Germany": "Berlin", "Austria": "Vienna", "Norway": "Oslo",
}  # fmt: skip
ATTEMPTS = 3


class Patience(World):
    """Asks for a capital until it is named in three words at most, or its patience is at an end."""

    @staticmethod
    def rows() -> dict[str, list[dict[str, Any]]]:
        """What there is to ask, for training and for measuring."""
        rows = [{"country": country, "capital": capital} for country, capital in FACTS.items()]
        return {"train": rows[:8], "heldout": rows[8:]}

    def reset(self, row: dict[str, Any]) -> str:
        """Ask for the first time."""
        self.capital, self.left = row["capital"], ATTEMPTS
        return f"What is the capital of {row['country']}?"

    def step(self, completion: str) -> Turn:
        """1 for a short answer, less for every attempt before it; half of it for the right city in too many words."""
        self.left -= 1
        words, right = len(completion.split()), self.capital in completion
        if right and words <= 3:
            return Turn("Right!", done=True, score=(self.left + 1) / ATTEMPTS)
        score = 0.25 * right + 0.25 * right / max(1, words - 3)
        return Turn("Shorter, please." if right else "No. Which city?", done=self.left == 0, score=score)


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the score of held-out conversations, before and after."""
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.05, optimizer="sgd", vectors=True, eval_every=5,
        generations=generations, prompts_per_generation=4, max_tokens=12, system="Answer in one word.",
    )  # fmt: skip
    curve: list[float] = []
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    rows = Patience.rows()
    with EggrollTrainer.from_model_id(model, config, environment_factory=Patience, dtype="float32") as trainer:
        trainer.evolve(rows["train"], eval_data=rows["heldout"], listeners=[watch])
    print(f"score of held-out conversations: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
