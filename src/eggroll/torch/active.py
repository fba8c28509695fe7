"""A model while it is its population: the block that members' values stand in, and what the block gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch.compiled import uncompiled
from eggroll.torch.draws import Draws
from eggroll.torch.hazards import refuse_hazards
from eggroll.torch.layout.outputs import Places
from eggroll.torch.layout.probe import learn_and_check
from eggroll.torch.layout.rows import Inputs, member_data, rows_from_input
from eggroll.torch.layout.split import Outputs, form_of, split_tree, stated
from eggroll.torch.members import Members
from eggroll.torch.ops.routed import written_out
from eggroll.torch.ops.routing import Routing
from eggroll.torch.ops.shared import SharedRows
from eggroll.torch.padding import padding_as_in_plain_models
from eggroll.torch.perturbed import MemberContext, PerturbedWeight, Value
from eggroll.torch.swap import place, swapped


class Active:
    """A population while it stands in the place of the model's parameters.

    Attributes:
        members: how many members there are.
        first: the first of them; the others follow it.
        generation: whose noise it is.
        indices: the members in the order of their rows.
    """

    def __init__(
        self,
        population: Members,
        values: dict[str, Tensor],
        context: MemberContext,
        members: int,
        first: int = 0,
        generation: int = 0,
    ) -> None:
        self.population, self.context, self.members, self.first = population, context, members, first
        self.generation = generation
        self.indices: Sequence[int] = range(first, first + members)
        self.values = self.placed = values
        self.outputs = Outputs()

    def expand(self, x: Tensor, dim: int | None = None) -> Tensor:
        """One batch for every member: ``(batch, ...)`` to ``(members * batch, ...)``, member by member.

        Numbers are not copied before a layer needs the copies: the model's first product is made once for all members.
        ``dim`` is where the batch is, if not in the population's ``batch_dim``: 1 for a recurrent state.
        """
        dim = self._batch_dim(x) if dim is None else stated(x, dim, 1)
        if self.context.single:
            return x
        if dim == 0 and x.ndim > 1 and x.is_floating_point() and not x.requires_grad and len(x) > 0:
            return SharedRows(x, self.context)
        return x.repeat(*([1] * dim), self.members, *([1] * (x.ndim - dim - 1)))

    def split(self, y: Any, dim: int | None = None) -> Any:
        """``(members * batch, ...)`` to ``(members, batch, ...)``: an output with one or more entries for every row.

        A recurrent state ``(layers, members * batch, h)`` becomes ``(members, layers, batch, h)``, and what belongs to
        no row ``(members, *shape)``. Tuples, lists and dictionaries are split tensor by tensor.

        Args:
            y: what the model gave, or a tensor made of it.
            dim: which dimension holds the rows, where neither the model's calls nor sizes tell.

        Raises:
            ConfigError: ``dim`` is none, or the members do not divide it.
            UnsupportedOperationError: the output does not hold the members, or sizes do not tell where.
        """
        rows = {count for count in (self.context.rows, *self.context.seen_rows) if count}
        held, members = tree_map(self._plain, y), self.members
        return split_tree(held, self.outputs, members, rows, self.population.batch_dim, dim)

    def _plain(self, y: Any) -> Any:
        """Values among outputs as plain tensors."""
        if isinstance(y, SharedRows):
            return y.written_out()
        if not isinstance(y, Value):
            return y
        if isinstance(y, PerturbedWeight) and self.context.single:
            plain = y.dense().unsqueeze(0)
        else:
            plain = member_data(y.by_member(), self.members, self.context.rows or 0)
        self.outputs.note(plain, ["own"])
        return plain

    def _batch_dim(self, x: Tensor) -> int:
        return min(self.population.batch_dim, max(x.ndim - 1, 0))

    def select_rows(self, member_of_row: Tensor) -> None:
        """From now on, row ``i`` of activations belongs to member ``member_of_row[i]`` (a subset, any order).

        Used while generating, to stop computing rows that have finished.
        """
        if self.context.single:
            return  # all rows are the one member's, whichever are left
        self.placed = {name: value.chosen(member_of_row) for name, value in self.values.items()}  # type: ignore[attr-defined]
        self.context.members = self.context.rows = len(member_of_row)
        self.indices = [self.first + int(member) for member in member_of_row]
        place(self.population.sites, self.placed)


def _kind(x: Any) -> Any:
    """What tells a call from another one that may take another path: a new dimension does, a new length does not."""
    if isinstance(x, Tensor):
        return x.ndim, x.dtype
    return x if isinstance(x, bool) else type(x)


class PerturbedModel(Members):
    """Members whose values can take the place of their model's parameters, one block at a time."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._probed: dict[Any, bool] = {}  # calls by their kind, and whether a small one of that kind has run
        self.places: dict[Any, Places] = {}  # where outputs hold rows, by their form
        self.given: Outputs | None = None  # of the last forward
        self._active = False

    @contextmanager
    def perturbed(
        self,
        generation: int,
        members: Sequence[int] | None = None,
        *,
        sigma: float | None = None,
        rows_per_member: int | None = None,
    ) -> Iterator[Active]:
        """Inside the block, the model is the population of ``members`` (consecutive; all by default).

        Inputs carry the members in their batch dimension, ``(len(members) * batch, ...)``, member by member
        (:meth:`Active.expand` makes them so), and so do outputs, ``model.generate()`` included. ``rows_per_member``
        states the batch where it cannot be read off the model's first input.

        Raises:
            ConfigError: members that do not exist, or inputs that do not have rows for each of them.
            UnsupportedOperationError: the model is in training mode with dropout or batch normalization, an
                operation has no rule and no exact fall-back, or the model mixes its rows (checked before its first
                call with a few members alone). The model is as before in every case.
        """
        chosen = range(self.population_size) if members is None else members
        self.check(chosen)
        count = None if len(chosen) == 1 else len(chosen)
        context = self.context(count, None if count is None or rows_per_member is None else count * rows_per_member)
        values = self.values(generation, chosen, context, sigma=self.sigma if sigma is None else sigma)
        with self.standing_in(Active(self, values, context, len(chosen), chosen[0], generation)) as active:
            yield active

    @contextmanager
    def member(
        self, generation: int, index: int, *, sigma: float | None = None, materialize: bool = False
    ) -> Iterator[nn.Module]:
        """Inside the block, the model is one member; inputs and outputs are its plain ones.

        With ``materialize`` its weights are made, as plain tensors that anything can be done with; otherwise they stay
        low-rank values, which need no memory.
        """
        self.check(range(index, index + 1))
        context = self.context(None)
        values = self.values(generation, [index], context, sigma=self.sigma if sigma is None else sigma)
        if materialize:
            values = {name: v.dense() if isinstance(v, PerturbedWeight) else v for name, v in values.items()}
        with self.standing_in(Active(self, values, context, 1, index, generation)):
            yield self.model

    @contextmanager
    def standing_in(self, active: Active) -> Iterator[Active]:
        """Inside the block, the values of ``active`` (of :meth:`values`, or others) are in the place of parameters."""
        with self.swapped(active.values), padding_as_in_plain_models(self.model):
            if active.context.single and self.draws is False:
                yield active
                return
            draws = Draws(self.noise.seed, active.generation, lambda: active.indices, active.context)
            around = partial(self._drawing, draws, active.context)
            try:
                before, after = partial(self._probe, active), partial(self._note, active)
                with rows_from_input(self.model, active.context, before, after, around):
                    yield active
            except RuntimeError as error:
                if active.context.refused is not None and "TorchScript" in str(error):
                    raise active.context.refused from error
                raise

    def _probe(self, active: Active, module: nn.Module, inputs: Inputs) -> None:
        """Before a module's first call: where each parameter meets the members, and whether rows hold them at all."""
        key = (id(module), tuple(map(_kind, inputs[0])), tuple((name, _kind(x)) for name, x in inputs[1].items()))
        if key not in self._probed and active.context.rows:
            self._probed[key] = learn_and_check(self, active.context, active.members, active.placed, module, inputs)
        active.outputs.unprobed |= not self._probed.get(key, True)

    def _note(self, active: Active, module: nn.Module, outputs: Any) -> Any:
        """After a call of a module: which of its outputs hold rows elsewhere than in the batch's dimension."""
        outputs = written_out(outputs) if active.context.picks else outputs
        if self.found and (places := self.found.get(form_of(module, outputs))):
            active.outputs.note(outputs, places.leaves)
        return outputs

    @contextmanager
    def _drawing(self, draws: Draws, context: MemberContext) -> Iterator[None]:
        """A call of the model: random numbers that it draws are each member's own, and so are rows that it picks."""
        with Routing(context) if context.picks and not context.single else nullcontext():
            if self.draws is False:
                yield
                return
            with draws.drawing(self.device):
                yield
        if self.draws is None:
            self.draws = draws.count > 0 or draws.others

    @contextmanager
    def swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Put values in the place of the model's parameters for the length of the block."""
        self._active = True
        try:
            with uncompiled(), swapped(self.model, self.sites, values, self.keeper):
                yield
        finally:
            self._active = False

    def check(self, members: Sequence[int]) -> None:
        """Refuse what cannot be evaluated: members that do not exist, a model that draws noise of its own."""
        if self._active:
            raise UnsupportedOperationError("the population is already active; leave the first block before the next")
        if len(members) == 0 or min(members) < 0 or max(members) >= self.population_size:
            raise ConfigError(
                f"members {members} must be within 0 to {self.population_size - 1} (population_size) and not empty"
            )
        if list(members) != list(range(members[0], members[0] + len(members))):
            raise ConfigError(f"members {list(members)} must be consecutive")
        refuse_hazards(self.model, len(members))
