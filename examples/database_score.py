"""A database call inside the score: which product to offer to a customer, judged by what SQL finds in the sales table.

    python examples/database_score.py     seconds

The model sees a customer's four features and picks one of twelve products. What that earns is computed by a query, so
no gradient reaches the model. All members' choices go into one table, and one query scores them all. Profit is
measured on customers that were not trained on.
"""

import sqlite3

import torch
from torch import nn

from eggroll import ESConfig
from eggroll.torch import Replica

CUSTOMERS, PRODUCTS, TRAIN = 600, 12, 400


def shop() -> tuple[sqlite3.Connection, torch.Tensor]:
    """A database with what each customer would buy of each product, and the customers' features ``(CUSTOMERS, 4)``."""
    torch.manual_seed(0)
    features = torch.randn(CUSTOMERS, 4)
    wants = torch.sigmoid(features @ torch.randn(4, PRODUCTS) * 1.5)  # how many of ten visits end in a sale
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE products (product INTEGER PRIMARY KEY, margin REAL)")
    database.execute("CREATE TABLE sales (customer INT, product INT, sold INT, PRIMARY KEY (customer, product))")
    database.execute("CREATE TABLE choices (member INT, customer INT, product INT)")
    database.executemany("INSERT INTO products VALUES (?, ?)", [(p, 1 + p % 4) for p in range(PRODUCTS)])
    rows = [(c, p, round(10 * wants[c, p].item())) for c in range(CUSTOMERS) for p in range(PRODUCTS)]
    database.executemany("INSERT INTO sales VALUES (?, ?, ?)", rows)
    return database, features


def profits(database: sqlite3.Connection, choices: torch.Tensor, customers: range) -> list[float]:
    """Mean profit per customer of each member's choices ``(members, customers)``."""
    database.execute("DELETE FROM choices")
    rows = ((m, c, p) for m, row in enumerate(choices.tolist()) for c, p in zip(customers, row, strict=True))
    database.executemany("INSERT INTO choices VALUES (?, ?, ?)", rows)
    query = """SELECT AVG(sold * margin) FROM choices JOIN sales USING (customer, product)
               JOIN products USING (product) GROUP BY member ORDER BY member"""
    return [profit for (profit,) in database.execute(query)]


def main(generations: int = 60, population_size: int = 64) -> tuple[float, float]:
    """Returns the mean profit on held-out customers, before and after."""
    database, features = shop()
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, PRODUCTS)).eval()
    config = ESConfig(population_size=population_size, rank=1, sigma=0.1, lr=0.05, optimizer="adam", seed=0)
    replica = Replica(model, config, kinds=("matrix", "vector"))

    def score(model, active):
        choices = active.split(model(active.expand(features[:TRAIN]))).argmax(-1)  # (members, TRAIN)
        return torch.tensor(profits(database, choices, range(TRAIN)))

    def heldout() -> float:
        with torch.no_grad():
            return profits(database, model(features[TRAIN:]).argmax(-1)[None], range(TRAIN, CUSTOMERS))[0]

    before = heldout()
    for _ in range(generations):
        replica.step(score)
    after = heldout()
    print(f"profit per held-out customer: {before:.1f} before, {after:.1f} after {generations} generations")
    return before, after


if __name__ == "__main__":
    main()
