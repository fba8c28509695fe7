"""``Population``: any module as many, evaluated together in the way that its layout of activations allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from eggroll.core.select import KINDS
from eggroll.errors import ConfigError
from eggroll.torch.active import Active, PerturbedModel
from eggroll.torch.auto import run_auto
from eggroll.torch.evaluate import RUNS, Call, run_rows, verify
from eggroll.torch.layout.split import Outputs, split_tree
from eggroll.torch.noise import CACHE_BYTES
from eggroll.torch.scores import checked_scores
from eggroll.torch.state import StateLostError

Mode = Literal["auto", "rows", "vmap", "loop"]
HINT = "Inside it, active.members counts them and active.split(y) gives (members, batch, ...)"


class Population(PerturbedModel):
    """``population_size`` members around a model's parameters, evaluated together (EGGROLL section 4).

    Member ``p`` is the model with ``W + sigma * E_p`` for every selected parameter: ``E_p = A_p B_p^T / sqrt(rank)``
    for matrices, dense N(0, 1) for everything else. The model is used as it is::

        population = Population(model, population_size=64, sigma=0.02, rank=1)
        with population.perturbed(generation=0) as active, torch.no_grad():
            y = model(active.expand(x))                 # (64 * batch, ...), member by member
        fitness = active.split(y).mean(dim=(1, 2))      # (64,)

    Args:
        model: any module, in evaluation mode.
        population_size: members; both signs of an antithetic pair count.
        sigma: standard deviation of a perturbation's entries (``perturbed`` can override it).
        rank: rank of the matrices' perturbations.
        seed: seed of the noise.
        antithetic: members ``2k`` and ``2k + 1`` share a draw with opposite signs.
        noise_reuse: generations that share the same noise.
        target_modules: name patterns of the parameters to perturb; ``None`` takes all of ``kinds``.
        exclude: name patterns of parameters to leave alone.
        kinds: kinds of parameters taken when ``target_modules`` is ``None`` (see :mod:`eggroll.core.select`).
        mode: how :meth:`forward` evaluates: all members as ``rows`` of one batch, by ``torch.vmap``, one after the
            other (``loop``), or the first of these that works (``auto``).
        batch_dim: the dimension of inputs and outputs that holds the batch: 0, or 1 for time-major models.
        cache_bytes: a generation's draws are kept for its update if they need at most this much memory.
        scales: perturb quantized matrices by a factor ``1 + sigma * E_p`` on their scales, one for each group of a row
            (:mod:`eggroll.torch.scaled`), instead of by adding to their weights.

    Raises:
        ConfigError: settings that cannot work.
        SelectionError: a pattern matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        population_size: int = 256,
        sigma: float = 0.01,
        rank: int = 1,
        seed: int = 42,
        antithetic: bool = True,
        noise_reuse: int = 1,
        target_modules: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        kinds: Sequence[str] = KINDS,
        mode: Mode = "auto",
        batch_dim: int = 0,
        cache_bytes: int = CACHE_BYTES,
        scales: bool = False,
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"mode (={mode!r}) must be one of: {', '.join(get_args(Mode))}")
        super().__init__(
            model, population_size=population_size, sigma=sigma, rank=rank, seed=seed, antithetic=antithetic,
            noise_reuse=noise_reuse, target_modules=target_modules, exclude=exclude, kinds=kinds, batch_dim=batch_dim,
            cache_bytes=cache_bytes, scales=scales,
        )  # fmt: skip
        self.mode: Mode = mode
        self._fall_back = self._announced = False
        self._given_rows = (0, 0)

    @torch.no_grad()
    def scores(
        self,
        fitness_fn: Callable[[Active], Any],
        generation: int,
        *,
        sigma: float | None = None,
        members_per_forward: int | None = None,
        members: range | None = None,
    ) -> Tensor:
        """Scores of members (all by default): ``fitness_fn`` is called while the model is (some of) them.

            >>> def fitness(active):
            ...     logits = active.split(model(active.expand(x)))  # (members, batch, classes)
            ...     return (logits.argmax(-1) == labels).float().mean(1)
            >>> population.scores(fitness, generation=0, members_per_forward=128)

        Args:
            fitness_fn: gets the :class:`Active` population, returns ``(members,)`` scores, or ``(members, prompts)``:
                a tensor or an array.
            generation: whose noise it is; the draws are kept for the update if they are small.
            sigma: instead of the population's own.
            members_per_forward: how many members are evaluated at once; all by default. A number whose activations
                stay in cache is the fastest. Results do not depend on it.
            members: consecutive members.

        Returns:
            ``(len(members),)`` or ``(len(members), prompts)`` scores, of the dtype and device of those returned.

        Raises:
            RewardError: something else than a score for each member.
        """
        everyone = range(self.population_size) if members is None else members
        step = members_per_forward or len(everyone)
        self.prepare(generation)
        # One tensor for all scores: small ones that outlive each part would split the memory that the next part needs.
        found: Tensor | None = None
        for first in range(everyone.start, everyone.stop, step):
            part = range(first, min(first + step, everyone.stop))
            with self.perturbed(generation, part, sigma=sigma) as active:
                scores = checked_scores(fitness_fn(active), len(part), "fitness_fn must return", "it returned", HINT)
            if found is None:
                found = scores.new_empty((len(everyone), *scores.shape[1:]))
            found[first - everyone.start : part.stop - everyone.start] = scores
            del scores
        assert found is not None
        return found

    def forward(
        self,
        *args: Any,
        generation: int,
        members: Sequence[int] | None = None,
        sigma: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model's outputs for inputs that carry the members in their batch dimension, in the population's ``mode``.

        ``mode="auto"`` tries rows, checked against single members on the first call, then ``vmap``, then the loop,
        and keeps to the first that works: ``population.mode`` says which it is then, and a log line says why and what
        it costs. Later inputs that this mode cannot run go through the ones after it. Inputs of another size than the
        first one's (a mask, positions) are the same for all members; a recurrent state ``(layers, rows, h)`` is not.
        What belongs to no row (a loss, a learned scale) is given for each member, ``(members, *shape)``;
        :meth:`split` gives the rest by members.
        """
        chosen = range(self.population_size) if members is None else members
        call = Call(self, (args, kwargs), generation, chosen, sigma)
        self.given = None
        outputs = self._evaluate(call)
        self.given = self.given or Outputs()  # of one member
        self._given_rows = len(chosen), call.rows
        return outputs

    def split(self, y: Any, dim: int | None = None) -> Any:
        """What the last :meth:`forward` gave, for each of its members: as :meth:`Active.split` does inside a block.

        ``(members * batch, ...)`` becomes ``(members, batch, ...)`` and a recurrent state ``(layers, members * batch,
        h)`` becomes ``(members, layers, batch, h)``; what belongs to no row has the members in front as it is.

        Raises:
            ConfigError: there was no forward, or ``dim`` (which says where the rows are) is none of ``y``.
            UnsupportedOperationError: ``y`` does not hold the members, or sizes do not tell where.
        """
        if self.given is None:
            raise ConfigError("population.split is for what population.forward gave: call that first")
        members, rows = self._given_rows
        return split_tree(y, self.given, members, {rows} if members > 1 and rows else set(), self.batch_dim, dim)

    def _evaluate(self, call: Call) -> Any:
        if self.mode == "auto":
            chosen_mode, outputs = run_auto(call)
            self.mode, self._fall_back = chosen_mode, True  # type: ignore[assignment]
            return outputs
        if not self._fall_back:
            return RUNS[self.mode](call)
        try:
            return run_rows(call, checked=True) if self.mode == "rows" else RUNS[self.mode](call)
        except Exception as error:  # the same model may need another way for other inputs
            if self.mode == "loop" or isinstance(error, StateLostError):
                raise
            modes = ("vmap", "loop") if self.mode == "rows" else ("loop",)
            announce, self._announced = not self._announced, True
            return run_auto(call, modes, announce=announce)[1]

    def verify(
        self,
        *args: Any,
        generation: int = 0,
        members: Sequence[int] | None = None,
        sigma: float | None = None,
        **kwargs: Any,
    ) -> float:
        """Largest relative difference between the population forward and single members.

        The first, middle and last of ``members`` are evaluated alone.

        Raises:
            UnsupportedOperationError: they differ beyond rounding, so rows do not hold the members of this model.
        """
        chosen = range(self.population_size) if members is None else members
        return verify(Call(self, (args, kwargs), generation, chosen, sigma))
