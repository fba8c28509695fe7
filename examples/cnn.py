"""A convolutional network on handwritten digits, trained on a rank: where the right class stands among the ten.

    python examples/cnn.py          about a minute on one core; needs torch and scikit-learn

The score is the mean of 1 / (rank of the right class), which has no gradient. All members share a minibatch.
Accuracy is measured on images that were not trained on.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from eggroll import ESConfig
from eggroll.torch import Replica


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 images ``(n, 1, 8, 8)`` in [0, 1] and their classes ``(n,)``, in a random order that is always the same."""
    images, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 8, 8) / 16, torch.tensor(classes)[order]


def main(generations: int = 300, population_size: int = 128, batch: int = 64) -> tuple[float, float]:
    """Returns the accuracy on 397 held-out images, before and after."""
    torch.manual_seed(0)
    images, classes = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip
    config = ESConfig(
        population_size=population_size, rank=1, sigma=0.05, lr=0.02, optimizer="adam",
        generations=generations, lr_schedule="linear", seed=0,
    )  # fmt: skip
    replica = Replica(model, config, kinds=("conv", "matrix", "vector"))

    def accuracy() -> float:
        with torch.no_grad():
            return (model(images[1400:]).argmax(1) == classes[1400:]).float().mean().item()

    before = accuracy()
    for _ in range(generations):
        rows = torch.randint(1400, (batch,))

        def reciprocal_rank(model, active, rows=rows):
            y = active.split(model(active.expand(images[rows])))  # (members, batch, 10)
            right = y.gather(-1, classes[rows].expand(len(y), -1)[..., None])
            return (1 / (y >= right).sum(-1)).mean(1)

        replica.step(reciprocal_rank)
    after = accuracy()
    print(f"accuracy on held-out digits: {before:.2f} before, {after:.2f} after {generations} generations")
    return before, after


if __name__ == "__main__":
    main()
