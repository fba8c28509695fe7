"""Two agents in self-play: each evolves against the other's current weights.

    python examples/self_play.py     a quarter of a minute on one core

The game is Nim: from a heap of up to twelve sticks, the players take one, two or three in turn, and who takes the last
one wins. Nobody tells the agents the rule behind it (leave a multiple of four). Every member plays every heap as first
and as second player, all members at once. Measured against an opponent that neither agent ever met: the perfect player.
"""

import torch
from torch import nn

from eggroll import ESConfig
from eggroll.torch import Replica

HEAP = 12
HEAPS = torch.arange(1, HEAP + 1)


def moves(logits: torch.Tensor, heap: torch.Tensor) -> torch.Tensor:
    """Sticks to take, 1 to 3 and never more than there are."""
    allowed = torch.arange(1, 4) <= heap.clamp(min=1)[..., None]
    return logits.masked_fill(~allowed, -torch.inf).argmax(-1) + 1


def wins(first, second, heap: torch.Tensor) -> torch.Tensor:
    """Whether the first player wins, for each heap; a player is a function from heaps to moves."""
    heap, won = heap.clone(), torch.zeros(heap.shape, dtype=torch.bool)
    for turn in range(HEAP):
        player = first if turn % 2 == 0 else second
        left = (heap - player(heap)).clamp(min=0)
        won |= (heap > 0) & (left == 0) & (turn % 2 == 0)
        heap = left
    return won


def perfect(heap: torch.Tensor) -> torch.Tensor:
    """Leaves a multiple of four where it can, and takes one stick where it cannot."""
    return torch.where(heap % 4 == 0, torch.ones_like(heap), heap % 4)


def main(generations: int = 120, population_size: int = 128) -> tuple[float, float]:
    """Returns the share of winnable heaps that the agents win against the perfect player, before and after."""
    torch.manual_seed(0)
    agents = [nn.Sequential(nn.Embedding(HEAP + 1, 16), nn.Tanh(), nn.Linear(16, 3)).eval() for _ in range(2)]
    config = ESConfig(population_size=population_size, rank=1, sigma=0.3, lr=0.1, optimizer="adam", seed=0)
    replicas = [Replica(agent, config, kinds=("matrix", "embedding", "vector")) for agent in agents]

    def winnable() -> float:
        with torch.no_grad():
            won = [wins(lambda h, a=agent: moves(a(h), h), perfect, HEAPS)[HEAPS % 4 != 0] for agent in agents]
        return torch.stack(won).float().mean().item()

    before = winnable()
    for _ in range(generations):
        for replica, other in zip(replicas, agents[::-1], strict=True):

            def score(model, active, other=other):
                heaps = HEAPS.repeat(active.members)  # every member plays every heap
                me = lambda h: moves(model(h), h)  # noqa: E731
                you = lambda h: moves(other(h), h)  # noqa: E731
                won = wins(me, you, heaps).float() + 1 - wins(you, me, heaps).float()
                return active.split(won).mean(1)

            replica.step(score)
    after = winnable()
    print(f"winnable heaps won against the perfect player: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
