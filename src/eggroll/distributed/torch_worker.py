"""``TorchWorker``: any small PyTorch module and a fitness function as a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.errors import ConfigError
from eggroll.loop import Evaluation, Heldout
from eggroll.torch import Active, Replica
from eggroll.torch.replica import MATRIX_KINDS

Fitness = Callable[[nn.Module, Active, int], Any]


class TorchWorker:
    """A module whose members are scored by one function, all of a range in one call::

        def fitness(model, active, generation):
            y = active.split(model(active.expand(x)))           # (members, batch, ...)
            return -(y - target).square().mean(dim=(1, 2))      # (members,)

        evolve(lambda: TorchWorker(make_model, fitness, config), config, workers=4)

    Args:
        make_model: makes the module, with the same weights each time: seed inside (``torch.manual_seed(0)``).
        fitness_fn: called with the model while it is a part of the population, with that part (its ``expand`` and
            ``split`` put members into a batch and take them out again, ``members`` counts them), and with the
            generation, which may choose the data. Returns ``(members,)`` or ``(members, prompts)`` scores.
        config: the settings of the algorithm.
        heldout_fn: the center's score, given the plain model.
        kinds: kinds of parameters that are evolved when ``config.target_modules`` is ``None``.
        members_per_forward: members that are evaluated at once; ``None`` is all of a range. As many as keep their
            activations in cache are the fastest.

    Raises:
        ConfigError: settings that cannot work.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        fitness_fn: Fitness,
        config: ESConfig,
        *,
        heldout_fn: Callable[[nn.Module], Any] | None = None,
        kinds: Sequence[str] = MATRIX_KINDS,
        members_per_forward: int | None = None,
    ) -> None:
        self.replica = Replica(make_model().eval(), config, kinds=kinds)
        self.members_per_forward = members_per_forward
        self._fitness, self._heldout = fitness_fn, heldout_fn

    @property
    def model(self) -> nn.Module:
        """The center."""
        return self.replica.model

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Scores of some members.

        Raises:
            RewardError: ``fitness_fn`` returned something else than a score for each of them.
        """
        scores = self.replica.evaluate(
            lambda model, active: self._fitness(model, active, generation),
            generation=generation,
            sigma=sigma,
            members=members,
            members_per_forward=self.members_per_forward,
        )
        return Evaluation(scores.double().cpu().numpy())

    def heldout(self, generation: int) -> Heldout:
        """The center's score.

        Raises:
            ConfigError: there is no ``heldout_fn``.
        """
        if self._heldout is None:
            raise ConfigError("held-out scores need heldout_fn; give one to TorchWorker, or use heldout=False")
        return Heldout(float(self._heldout(self.replica.model)))

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        return self.replica.apply(record)

    @property
    def update_cosine(self) -> float | None:
        """See :class:`eggroll.loop.Worker`."""
        return self.replica.updater.turning.cosine

    def state_tensors(self) -> dict[str, Tensor]:
        """Evolved parameters, masters and the optimizer's state."""
        return self.replica.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_tensors`."""
        self.replica.load_state_tensors(tensors)
