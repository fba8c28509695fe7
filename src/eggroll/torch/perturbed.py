"""Perturbed parameters as values: tensors that stand for all members at once.

A value takes the place of a parameter while an unmodified model runs. Two kinds:

- :class:`PerturbedWeight`, the matrices ``W + A_p B_p^T`` in factored form, never materialized;
- :class:`MemberTensor`, a dense tensor with a member axis of its own: perturbed vectors, and results of values that
  met no activation yet (GPT-2's position embeddings, T5's relative bias).

Activations stay plain tensors whose leading dimension is ``members * batch``, member by member ("rows"). What an
operation does with a value is in :mod:`eggroll.torch.ops`. An operation that would pass a value by unseen (a C++
function that does not ask for overrides) reaches ``__torch_dispatch__`` and raises: never a silently wrong result.

Shapes: P members, R rows (= P * batch), n in, m out, r rank; ``...`` more dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from eggroll.core.select import Kind
from eggroll.errors import UnsupportedOperationError
from eggroll.torch.kernels.native import is_unobserved
from eggroll.torch.low_rank import Product
from eggroll.torch.quantized.tensor import plain

Layout = Literal["rows", "time_major", "shared", "mixed", "rows_or_constant"]
"""Where the population is in an activation: the leading dimension, the second one, nowhere; ``mixed``: it varies;
``rows_or_constant``: the leading dimension, or nowhere where the model's own buffers and parameters are used."""

WAYS_OUT = (
    "Ways out: leave the parameter alone (exclude=[{name!r}]), or evaluate one member at a time "
    '(mode="loop"), which works for every operation.'
)


SHARED_INPUT = "the input that active.expand made"

Use = tuple[str, str, int]
"""A use of a parameter: its name, the kind of operation, and the dimensions of what it met."""


@dataclass
class MemberContext:
    """What all values of one population forward share.

    Attributes:
        members: P, or ``None`` for a single member, whose values have no member axis.
        rows: R, the leading dimension of activations; ``None`` until it is known, 0 if inputs have no batch.
        layouts: per use of a parameter, the layout of the activations that it met where that was beyond doubt.
            Kept from call to call; :mod:`eggroll.torch.layout.rules` reads and writes it.
        batch_dim: the dimension of the model's inputs that holds the members.
        trusting: take the likely layout where sizes are ambiguous, and remember it, instead of raising: while
            layouts are learned, and in evaluations that are checked against single members.
        inputs: addresses of the memory of the running call's inputs; ``None`` while no call is running.
        constants: addresses of the memory of the model's parameters and buffers, which are the same for all members.
        max_dense_bytes: how much one materialized parameter may take (P copies) before an error is raised instead.
        refused: the last operation that a value passed by unseen; TorchScript swallows its error's text.
        seen_rows: R of every call of the model so far.
        picks: rows that the model picks by their numbers know their members (:mod:`eggroll.torch.ops.routing`).
    """

    members: int | None
    rows: int | None = None
    layouts: dict[Use, Layout] = field(default_factory=dict)
    batch_dim: int = 0
    trusting: bool = False
    inputs: frozenset[int] | None = None
    constants: frozenset[int] = frozenset()
    max_dense_bytes: int = 2**30
    refused: UnsupportedOperationError | None = None
    seen_rows: set[int | None] = field(default_factory=set)
    picks: bool = False

    @property
    def single(self) -> bool:
        """Whether the values are those of one member."""
        return self.members is None

    def is_rows(self, size: int) -> bool:
        """Whether a dimension of ``size`` can be the rows; the first size seen fixes R if nothing did before."""
        assert self.members is not None
        if self.rows is None:
            if size % self.members or size == 0:
                return False
            self.rows = size
        return self.rows > 0 and size % self.rows == 0


Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_handler: list[Handler] = []


def set_handler(handler: Handler) -> None:
    """Install what runs an operation on values. Called once, by :mod:`eggroll.torch.ops`."""
    _handler[:] = [handler]


class Value(Tensor):
    """Base of the values: a tensor with metadata and no storage of its own."""

    parameter: str
    context: MemberContext

    @staticmethod
    def __new__(cls, shape: Any, dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> Value:  # noqa: D102
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _handler[0](func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Value)]
        if all(value.context.single for value in values) and not func._schema.is_mutable:  # type: ignore[attr-defined]
            return call_materialized(func, args, kwargs or {})
        name = values[0].parameter if values else "a parameter"
        error = UnsupportedOperationError(
            f"parameter {name!r} is perturbed and reached the operation {func} without a population rule. "
            + WAYS_OUT.format(name=name)
        )
        for value in values:
            value.context.refused = error
        raise error

    if TYPE_CHECKING:  # weights and what is made of them have it; inputs that all members share are plain rows

        def by_member(self) -> MemberTensor:
            """The same values with the member axis spelled out."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        members = self.context.members or "one"
        return f"{type(self).__name__}({self.parameter!r}, shape={tuple(self.shape)}, members={members})"


class PerturbedWeight(Value):
    """``base + a b^T`` for every member: ``base`` of shape ``(*batch, m, ...)``, factors scaled and signed.

    Args:
        base: the center, shape ``(m, n)``, ``(E, m, n)`` for experts, or a convolution kernel ``(m, C, *k)``.
        a: ``(P, *batch, m, r)``, or without ``P`` for a single member; sigma, 1/sqrt(r) and the sign are in it. In
            memory the rank comes before ``m`` (and before ``n`` in ``b``), so that products run along long rows.
        b: ``(P, *batch, n, r)``, likewise.
    """

    base: Tensor
    a: Tensor
    b: Tensor
    kind: Kind

    @staticmethod
    def __new__(cls, base: Tensor, *args: Any, **kwargs: Any) -> PerturbedWeight:  # noqa: D102
        return Value.__new__(cls, base.shape, base.dtype, base.device)  # type: ignore[return-value]

    def __init__(self, base: Tensor, a: Tensor, b: Tensor, *, name: str, kind: Kind, context: MemberContext) -> None:
        self.base, self.a, self.b = base, a, b
        self.parameter, self.kind, self.context = name, kind, context
        self._product: Product | None = None
        self._transposed: PerturbedWeight | None = None

    @property
    def product(self) -> Product:
        """What multiplies rows with all members' matrices; kept, as decoding calls it at every step."""
        if self._product is None:
            self._product = Product(self.base, self.a, self.b)
        return self._product

    def like(self, base: Tensor, a: Tensor, b: Tensor, *, kind: Kind | None = None) -> PerturbedWeight:
        """The same parameter with other arrays (a view, a cast, a selection)."""
        return type(self)(base, a, b, name=self.parameter, kind=kind or self.kind, context=self.context)

    def chosen(self, index: Tensor) -> PerturbedWeight:
        """The factors of members at ``index`` (a subset, any order)."""
        return self.like(self.base, _chosen(self.a, index), _chosen(self.b, index))

    def by_member(self) -> MemberTensor:
        """All members materialized."""
        return MemberTensor(self.dense(), name=self.parameter, context=self.context)

    def transposed(self) -> PerturbedWeight:
        """The last two dimensions swapped: ``W^T + b a^T``; kept, as its product is (``x @ W`` is one with it)."""
        followed = self.base.requires_grad or self.a.requires_grad or self.b.requires_grad
        if self._transposed is not None and not followed:
            return self._transposed
        turned = self.like(self.base.transpose(-1, -2), self.b, self.a)
        if not followed and is_unobserved():  # a view of a traced tensor must not outlive the trace
            self._transposed = turned
        return turned

    def dense(self) -> Tensor:
        """All members materialized, ``(P, *shape)``, or ``shape`` for a single member.

        Computed in float32 (float64 for float64 parameters) and rounded once to the parameter's dtype.

        Raises:
            UnsupportedOperationError: the copies would take more than the context allows.
        """
        self.check_size()
        wide = torch.promote_types(self.base.dtype, torch.float32)
        noise = (self.a.to(wide) @ self.b.to(wide).transpose(-1, -2)).reshape(
            *(() if self.context.single else self.a.shape[:1]), *self.base.shape
        )
        return (plain(self.base).to(wide) + noise).to(self.base.dtype)

    def check_size(self) -> None:
        """Refuse materialized members that would take more than the context allows."""
        context = self.context
        if context.members is None:
            return
        needed = context.members * self.base.numel() * self.base.element_size()
        if needed > context.max_dense_bytes:
            raise UnsupportedOperationError(
                f"parameter {self.parameter!r} is used in an operation without a low-rank rule, and "
                f"{context.members} materialized copies of {tuple(self.base.shape)} would take "
                f"{needed / 2**30:.1f} GiB. " + WAYS_OUT.format(name=self.parameter)
            )


def call_materialized(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` on the weights of a single member."""
    plain_args, plain_kwargs = tree_map_only(PerturbedWeight, PerturbedWeight.dense, (args, kwargs))
    return func(*plain_args, **plain_kwargs)


def _chosen(factor: Tensor, index: Tensor) -> Tensor:
    """Members of a factor, with the rank before the long dimension in memory as before."""
    return factor.transpose(-1, -2)[index].transpose(-1, -2)


class MemberTensor(Value):
    """A dense tensor per member: ``data`` of shape ``(P, *shape)``, seen by the model as ``shape``."""

    data_P: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, *args: Any, **kwargs: Any) -> MemberTensor:  # noqa: D102
        return Value.__new__(cls, data.shape[1:], data.dtype, data.device)  # type: ignore[return-value]

    def __init__(self, data: Tensor, *, name: str, context: MemberContext) -> None:
        self.data_P, self.parameter, self.context = data, name, context

    @property
    def member_shape(self) -> torch.Size:
        """The shape that the model sees, without the detour of asking for ``shape``."""
        return self.data_P.shape[1:]

    def like(self, data: Tensor) -> MemberTensor:
        """The same origin with other contents."""
        return MemberTensor(data, name=self.parameter, context=self.context)

    def by_member(self) -> MemberTensor:
        """This."""
        return self

    def chosen(self, index: Tensor) -> MemberTensor:
        """The tensors of members at ``index`` (a subset, any order)."""
        return self.like(self.data_P[index])
