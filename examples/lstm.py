"""An LSTM that must remember the first symbol of a sequence until its end, trained on accuracy.

    python examples/lstm.py         about a minute on one core

The recurrence is PyTorch's own ``nn.LSTM``. Nothing is unrolled for a backward pass, so memory does not grow with the
length of the sequences. Accuracy is measured on new sequences; a quarter is right by chance.
"""

import torch
from torch import nn

from eggroll import ESConfig
from eggroll.torch import Replica

SYMBOLS, LENGTH = 4, 10


class Recall(nn.Module):
    """Symbols ``(n, LENGTH)`` in, a score for each possible first symbol ``(n, SYMBOLS)`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SYMBOLS + 1, 24, batch_first=True)
        self.head = nn.Linear(24, SYMBOLS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Read the sequence and answer after its last symbol."""
        return self.head(self.lstm(x)[0][:, -1])


def sequences(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One-hot symbols with a mark on the first one, ``(count, LENGTH, SYMBOLS + 1)``, and the first symbols."""
    symbols = torch.randint(SYMBOLS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    x = torch.zeros(count, LENGTH, SYMBOLS + 1)
    x[..., :SYMBOLS] = nn.functional.one_hot(symbols, SYMBOLS)
    x[:, 0, SYMBOLS] = 1
    return x, symbols[:, 0]


def main(generations: int = 200, population_size: int = 128, batch: int = 64) -> tuple[float, float]:
    """Returns the accuracy on 1,000 new sequences, before and after."""
    torch.manual_seed(0)
    model = Recall().eval()
    config = ESConfig(
        population_size=population_size, rank=1, sigma=0.1, lr=0.03, optimizer="adam",
        generations=generations, lr_schedule="linear", seed=0,
    )  # fmt: skip
    replica = Replica(model, config, kinds=("matrix", "vector"))
    new, first = sequences(1000, seed=10**6)

    def accuracy() -> float:
        with torch.no_grad():
            return (model(new).argmax(1) == first).float().mean().item()

    before = accuracy()
    for generation in range(generations):
        x, y = sequences(batch, seed=generation)
        replica.step(lambda model, active, x=x, y=y: (
            active.split(model(active.expand(x))).argmax(-1) == y).float().mean(1)
        )  # fmt: skip
    after = accuracy()
    print(f"first symbol right in new sequences: {before:.2f} before, {after:.2f} after {generations} generations")
    return before, after


if __name__ == "__main__":
    main()
