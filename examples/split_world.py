"""Self-play in words: members of the population bargain with each other over ten coins. Run it, or tune with it.

    python examples/split_world.py           twelve minutes on one busy core
    eggroll tune smollm2-135m --world examples/split_world.py:Split

Both name a number at once, three times. Each gets its own, unless the two are more than ten together: then nobody gets
anything. Worlds of one batch live in one process, so they can wait for each other: every member plays against the one
half a population away. Measured against players that neither has met: they always want the same share.
"""

import asyncio
import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, ClassVar

from eggroll import EggrollConfig, EggrollTrainer
from eggroll.llm import Turn, World

COINS, ROUNDS = 10, 3
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")


class Split(World):
    """One side of a table; the other one is another member, or a player who always wants the same."""

    tables: ClassVar[dict[str, list[Any]]] = defaultdict(list)

    @staticmethod
    def rows() -> dict[str, list[dict[str, Any]]]:
        """Whom there is to play with: other members for training, stubborn players for measuring."""
        stubborn = [{"name": name, "always": 2 + place % 4 * 2} for place, name in enumerate(NAMES)]
        return {"train": [{"name": name, "always": None} for name in NAMES], "heldout": stubborn}

    async def reset(self, row: dict[str, Any]) -> str:
        """Sit down. An async method runs on the one event loop, row by row, so the seats are the same each time."""
        self.name, self.always, self.coins, self.round = row["name"], row["always"], 0, 0
        self.said = [asyncio.get_running_loop().create_future() for _ in range(ROUNDS)]
        self.tables[self.name].append(self)
        return f"You and {self.name} share {COINS} coins. How many do you want? Answer with a number from 0 to {COINS}."

    async def step(self, completion: str) -> Turn:
        """Name a number, wait for the other player's, and keep yours if both fit. Scores the share of all coins."""
        number = re.search(r"\d+", completion)
        mine = int(number[0][:9]) if number else COINS + 1
        self.said[self.round].set_result(mine)
        seats = self.tables[self.name]
        other = seats[(seats.index(self) + len(seats) // 2) % len(seats)]
        try:
            theirs = self.always or await asyncio.wait_for(other.said[self.round], 5)
        except TimeoutError:  # that conversation has ended early
            theirs = COINS + 1
        deal = mine + theirs <= COINS
        self.coins, self.round = self.coins + mine * deal, self.round + 1
        text = f"{self.name} wants {theirs}, so {f'you get {mine}' if deal else 'nobody gets anything'}. And now?"
        return Turn(text, done=self.round == ROUNDS, score=self.coins / (COINS * ROUNDS))

    async def close(self) -> None:
        """Leave the table."""
        self.tables[self.name].remove(self)


def main(model: str = "smollm2-135m", generations: int = 20, population_size: int = 16) -> tuple[float, float]:
    """Returns the share of the coins that stubborn players leave to the model, before and after."""
    config = EggrollConfig(
        population_size=population_size, rank=1, sigma=0.01, lr=0.05, optimizer="sgd", vectors=True, eval_every=5,
        generations=generations, prompts_per_generation=4, max_tokens=6, members_per_forward=population_size,
    )  # fmt: skip
    curve: list[float] = []
    watch = SimpleNamespace(generation=lambda m: "heldout_reward" in m and curve.append(m["heldout_reward"]))
    rows = Split.rows()
    with EggrollTrainer.from_model_id(model, config, environment_factory=Split, dtype="float32") as trainer:
        trainer.evolve(rows["train"], eval_data=rows["heldout"], listeners=[watch])
    print(f"share of the coins: {curve[0]:.2f} before, {curve[-1]:.2f} after {generations} generations")
    return curve[0], curve[-1]


if __name__ == "__main__":
    main()
