"""Rules for weights whose scales are perturbed: products and embeddings; anything else gets them materialized."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.layout.rules import layout_of, layout_of_ids
from eggroll.torch.ops.elementwise import with_rows
from eggroll.torch.ops.registry import RULES, Rule
from eggroll.torch.perturbed import MemberTensor, Value
from eggroll.torch.scaled import ScaledWeight


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, ScaledWeight) or (isinstance(bias, Value) and not isinstance(bias, MemberTensor)):
        return NotImplemented
    if isinstance(x, MemberTensor):
        return x.like(_rows(x.data_P, weight, bias))
    if isinstance(x, Value):
        return NotImplemented
    if weight.context.single:
        return weight.times(x, bias)
    layout = layout_of(weight.context, weight.parameter, "product", x)
    if layout == "rows":
        return _rows(x, weight, bias)
    if layout == "time_major":
        return _rows(x.transpose(0, 1), weight, bias).transpose(0, 1).contiguous()
    return _of_members(_rows(_copies(x, weight), weight, bias), weight)


def _rows(x: Tensor, weight: ScaledWeight, bias: Any) -> Tensor:
    """Rows ``(P * B, ..., n)``; the member axis of ``(P, ..., n)`` serves as well."""
    if isinstance(bias, MemberTensor):
        return with_rows(lambda x, bias: x + bias, weight.times(x), bias)
    return weight.times(x, bias)


def _copies(x: Tensor, weight: ScaledWeight) -> Tensor:
    """An input that is the same for all members, for each of them: ``(P, *x.shape)``."""
    return x.unsqueeze(0).expand(weight.a.shape[0], *x.shape)


def _of_members(data_P: Tensor, weight: ScaledWeight) -> MemberTensor:
    return MemberTensor(data_P, name=weight.parameter, context=weight.context)


def _embedding(ids: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any) -> Any:
    if not isinstance(weight, ScaledWeight) or isinstance(ids, Value) or max_norm is not None:
        return NotImplemented
    if weight.context.single:
        return weight.rows(ids)
    layout = layout_of_ids(weight.context, weight.parameter, ids)
    if layout == "rows":
        return weight.rows(ids)
    if layout == "time_major":
        return weight.rows(ids.transpose(0, 1)).transpose(0, 1).contiguous()
    return _of_members(weight.rows(_copies(ids, weight)), weight)


_AS_IT_IS = (
    Tensor.detach, Tensor.contiguous, Tensor.data.__get__, Tensor.requires_grad_, Tensor.__deepcopy__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__set__, Tensor.grad.__set__,  # type: ignore[attr-defined,union-attr]
)  # fmt: skip
SCALED_RULES: dict[Any, Rule] = {F.linear: _linear, F.embedding: _embedding} | {func: RULES[func] for func in _AS_IT_IS}
