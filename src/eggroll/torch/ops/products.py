"""Rules for matrix products and embeddings.

Which dimension of an activation holds the population is decided per product (:mod:`eggroll.torch.layout.rules`): the
leading one (rows), the second one (time-major recurrent layouts), or none (an input that is the same for all members).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import low_rank
from eggroll.torch.layout.rules import in_second, is_constant, layout_of, layout_of_ids
from eggroll.torch.ops.elementwise import with_rows
from eggroll.torch.ops.per_member import per_member
from eggroll.torch.ops.registry import context_of, rule
from eggroll.torch.perturbed import WAYS_OUT, MemberContext, MemberTensor, PerturbedWeight, Value


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` for rows ``x (R, ..., n)``; weight and bias may be values or plain."""
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        with torch.autocast(x.device.type, enabled=False):
            return linear_rows(*(_autocast(part, x.device.type) for part in (x, weight, bias)))
    plain_bias = None if isinstance(bias, Value) else bias
    if isinstance(weight, PerturbedWeight):
        if weight.context.single:
            out = low_rank.linear_single(x, weight.base, weight.a, weight.b)
            out = out if plain_bias is None else out + plain_bias
        else:
            return _linear_of_population(x, weight, bias)
    elif isinstance(weight, MemberTensor):
        members = weight.data_P.shape[0]
        x_PRn = x.reshape(members, -1, x.shape[-1])
        out = torch.bmm(x_PRn, weight.data_P.transpose(1, 2)).reshape(*x.shape[:-1], -1)
        out = out if plain_bias is None else out + plain_bias
    else:
        out = F.linear(x, weight, plain_bias)
    return with_rows(torch.add, out, bias) if isinstance(bias, MemberTensor) else out


def _linear_of_population(x: Tensor, weight: PerturbedWeight, bias: Tensor | None) -> Tensor:
    """Rows through a perturbed matrix; the bias, of all members or of each, is added in the same pass."""
    if not isinstance(bias, MemberTensor):
        return weight.product(x, bias)
    if bias.data_P.ndim != 2 or bias.data_P.dtype != weight.base.dtype:
        return with_rows(torch.add, weight.product(x), bias)
    return weight.product(x, bias.data_P)


def _autocast(x: Any, device_type: str) -> Any:
    """What autocast would make of an argument of a product; in-place products cannot be left to it."""
    return x if x is None else x.to(torch.get_autocast_dtype(device_type))


@rule(F.linear)
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x W^T + bias``."""
    if type(weight) is PerturbedWeight and bias is None and type(x) is Tensor and not weight.context.single:
        # What follows, for the case that decoding goes through hundreds of times per token.
        layout = layout_of(weight.context, weight.parameter, "product", x)
        if layout == "rows" and not torch.is_autocast_enabled(x.device.type):
            return weight.product(x)
    context = context_of(weight, bias, x)
    if isinstance(bias, PerturbedWeight) or not isinstance(weight, PerturbedWeight | MemberTensor | Tensor):
        return NotImplemented
    if isinstance(x, Value):
        return _linear_of_value(x, weight, bias)
    if context.single:
        return linear_rows(x, weight, bias)
    if isinstance(weight, MemberTensor) and weight.ndim != 2:
        return NotImplemented
    name = next(value.parameter for value in (weight, bias) if isinstance(value, Value))
    layout = layout_of(context, name, "product", x)
    if layout == "rows":
        return linear_rows(x, weight, bias)
    if layout == "time_major":
        return linear_rows(x.transpose(0, 1), weight, bias).transpose(0, 1).contiguous()  # a .view may follow
    if not isinstance(weight, PerturbedWeight):
        return per_member(F.linear, (x, weight, bias), {}, layout="shared")
    b_Pm = bias.data_P if isinstance(bias, MemberTensor) else bias
    out = low_rank.linear_shared(x, weight.base, weight.a, weight.b, b_Pm)
    return MemberTensor(out, name=weight.parameter, context=context)


def _linear_of_value(x: Value, weight: Any, bias: Any) -> Any:
    """The input is a value itself; its member axis serves as the rows."""
    if not isinstance(x, MemberTensor):
        return NotImplemented
    return x.like(linear_rows(x.data_P, weight, bias))


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(left: Any, right: Any, *out_dtype: Any) -> Any:
    """``left @ right`` with a perturbed matrix on either side."""
    if out_dtype:
        return NotImplemented
    if isinstance(right, MemberTensor) and right.ndim == 3 and isinstance(left, Tensor) and left.ndim == 3:
        return bmm(left, right)
    if isinstance(right, PerturbedWeight):
        if right.kind == "experts" or right.base.ndim > 2:
            return bmm(left, right)
        return linear(left, right.transposed())
    if isinstance(left, PerturbedWeight) and isinstance(right, Tensor) and right.ndim >= 2:
        if left.base.ndim > 2:
            return bmm(left, right)
        out = linear(right.transpose(-1, -2), left)
        return NotImplemented if out is NotImplemented else out.transpose(-1, -2)
    return NotImplemented


@rule(Tensor.__rmatmul__)
def rmatmul(right: Any, left: Any) -> Any:
    """``left @ right``, called on ``right``."""
    return matmul(left, right)


@rule(torch.addmm, Tensor.addmm)
def addmm(bias: Any, x: Any, weight: Any, *out_dtype: Any, beta: float = 1, alpha: float = 1) -> Any:
    """``bias + x @ W``: the ``Conv1D`` of Hugging Face."""
    if beta != 1 or alpha != 1 or out_dtype:
        return NotImplemented
    if isinstance(bias, MemberTensor) and not isinstance(x, Value) and not isinstance(weight, Value):
        return torch.mm(x, weight) + bias
    if not isinstance(weight, PerturbedWeight):
        return NotImplemented
    return linear(x, weight.transposed(), bias)


@rule(torch.bmm, Tensor.bmm)
def bmm(left: Any, right: Any, *out_dtype: Any) -> Any:
    """Batched products with expert weights ``(E, n, m)``: tokens ``(E, rows, n)``, or one selected matrix per row."""
    if out_dtype:
        return NotImplemented
    if isinstance(right, MemberTensor) and not isinstance(left, Value) and _is_grouped(left, right):
        groups, tokens, _ = left.shape
        x_PETn = left.reshape(groups, right.data_P.shape[0], -1, left.shape[-1]).transpose(0, 1)
        return (x_PETn @ right.data_P).transpose(0, 1).reshape(groups, tokens, -1)
    value = left if isinstance(left, PerturbedWeight) else right
    if not isinstance(value, PerturbedWeight) or isinstance(left, Value) == isinstance(right, Value):
        return NotImplemented
    if value.context.single:
        if value is right:
            return low_rank.matmul_single(left, value.base, value.a, value.b)
        return value.base @ right + value.a @ (value.b.transpose(-1, -2) @ right)
    if value is left or left.ndim != 3 or left.shape[0] != value.shape[0]:
        return NotImplemented
    if not value.context.is_rows(left.shape[1]):
        return NotImplemented
    experts, tokens, _ = left.shape
    members = value.a.shape[0]
    out = torch.bmm(left, value.base)
    x_EPRn = left.reshape(experts, members, tokens // members, -1)
    low = torch.einsum("eprn,penk->eprk", x_EPRn, value.a)
    return out + torch.einsum("eprk,pemk->eprm", low, value.b).reshape(out.shape)


def _is_grouped(left: Tensor, value: MemberTensor) -> bool:
    """Whether what meets a value ``(E, n, m)`` is ``(E, rows * T, n)``."""
    context, key = value.context, (value.parameter, "groups", 3)
    if value.ndim != 3 or left.ndim != 3 or left.shape[0] != value.shape[0] or is_constant(context, left):
        return False
    return in_second(context, key, left) == "time_major"


@rule(torch.baddbmm, Tensor.baddbmm)
def baddbmm(bias: Any, left: Any, right: Any, *out_dtype: Any, beta: float = 1, alpha: float = 1) -> Any:
    """``bias + left @ right`` of groups: products and biases ``(E, 1, m)`` of each group."""
    if out_dtype or beta != 1 or alpha != 1 or isinstance(left, Value) or isinstance(bias, PerturbedWeight):
        return NotImplemented
    out = bmm(left, right) if isinstance(right, Value) else torch.bmm(left, right)
    return out if out is NotImplemented else out + bias


@rule(Tensor.view, Tensor.reshape, torch.reshape)
def view(value: Any, *sizes: Any) -> Any:
    """A matrix ``(E * m, n)`` as one ``(m, n)`` for each of ``E`` groups, in low rank."""
    shape = list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else list(sizes)
    if not isinstance(value, PerturbedWeight) or value.base.ndim != 2 or value.kind == "conv" or len(shape) != 3:
        return NotImplemented
    base = value.base.reshape(shape)
    if base.shape[-1] != value.base.shape[-1]:
        return NotImplemented
    groups, inputs, rank = base.shape[0], *value.b.shape[-2:]
    b = value.b.unsqueeze(-3).expand(*value.b.shape[:-2], groups, inputs, rank)
    return value.like(base, value.a.unflatten(-2, (groups, -1)), b, kind="experts")


@rule(F.embedding)
def embedding(
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Gathered rows of a perturbed embedding."""
    if not isinstance(weight, PerturbedWeight) or isinstance(ids, Value) or max_norm is not None:
        return NotImplemented
    context = weight.context
    if context.single:
        return F.embedding(ids, weight.base) + F.embedding(ids, weight.a) @ weight.b.transpose(-1, -2)
    if torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):
            return embedding(ids, weight)
    layout = layout_of_ids(context, weight.parameter, ids)
    if layout == "rows":
        return low_rank.embedding(ids, weight.base, weight.a, weight.b)
    if layout == "time_major":
        gathered = low_rank.embedding(ids.transpose(0, 1), weight.base, weight.a, weight.b)
        return gathered.transpose(0, 1).contiguous()
    shared = low_rank.embedding_shared(ids, weight.base, weight.a, weight.b)
    return MemberTensor(shared, name=weight.parameter, context=context)


@rule(Tensor.__getitem__)
def getitem(value: Any, index: Any) -> Any:
    """Slices of a matrix's rows, and the experts that a router chose."""
    if not isinstance(value, PerturbedWeight):
        return NotImplemented
    context, single = value.context, value.context.single
    if isinstance(index, slice) and value.kind != "conv" and value.base.ndim == 2:
        return value.like(value.base[index], value.a[..., index, :], value.b)
    if value.kind != "experts" or isinstance(index, tuple | slice) or index is None:
        return NotImplemented
    is_list = isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.long
    if single:
        if is_list or isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0):
            return value.like(value.base[index], value.a[index], value.b[index], kind="matrix")
        return NotImplemented
    is_one = isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)
    if is_one and context.picks:
        return value.like(value.base[index], value.a[:, index], value.b[:, index], kind="matrix")
    if not is_list or not context.is_rows(index.shape[0]):
        raise UnsupportedOperationError(
            f"parameter {value.parameter!r} holds experts and is indexed by {index!r}: with tokens regrouped by "
            "expert, a row's member is no longer known. " + WAYS_OUT.format(name=value.parameter)
        )
    per_member = index.shape[0] // value.a.shape[0]
    member = torch.arange(index.shape[0], device=index.device) // per_member
    routed = MemberContext(members=None)
    selected = (value.base[index], value.a[member, index], value.b[member, index])
    return PerturbedWeight(*selected, name=value.parameter, kind="matrix", context=routed)


@rule(Tensor.t, torch.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def t(value: Any) -> Any:
    """The transpose of a matrix."""
    if not isinstance(value, PerturbedWeight) or value.kind == "conv":
        return NotImplemented
    return value.transposed()


@rule(Tensor.transpose, torch.transpose, Tensor.swapaxes, Tensor.swapdims)
def transpose(value: Any, dim0: int, dim1: int) -> Any:
    """Swap of a matrix's two dimensions."""
    if not isinstance(value, PerturbedWeight) or value.kind == "conv":
        return NotImplemented
    ndim = value.base.ndim
    if {dim0 % ndim, dim1 % ndim} != {ndim - 1, ndim - 2}:
        return NotImplemented
    return value.transposed()
