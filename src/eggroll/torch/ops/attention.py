"""Rule for ``torch.nn.MultiheadAttention``, whose projections share one packed weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.ops.products import linear_rows
from eggroll.torch.ops.registry import context_of, rule
from eggroll.torch.perturbed import MemberTensor, PerturbedWeight, Value


def _part(value: Any, index: int, size: int) -> Any:
    """One of the three parts of a packed weight or bias."""
    if value is None:
        return None
    rows = slice(index * size, (index + 1) * size)
    if isinstance(value, PerturbedWeight):
        return value[rows]
    return value.like(value.data_P[:, rows]) if isinstance(value, MemberTensor) else value[rows]


@rule(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """Attention over time-major rows ``(T, R, E)``; masks as in torch."""
    values = (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, q_proj_weight, k_proj_weight, v_proj_weight)
    context = context_of(*values)
    is_value = any(isinstance(x, Value) for x in (query, key, value, attn_mask, key_padding_mask))
    if context.single or is_value or query.ndim != 3 or (is_causal and attn_mask is None):
        return NotImplemented
    if static_k is not None or static_v is not None or (training and dropout_p > 0.0):
        return NotImplemented
    if not context.is_rows(query.shape[1]):
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    projected = []
    for index, source in enumerate((query, key, value)):
        weight = weights[index] if use_separate_proj_weight else _part(in_proj_weight, index, embed_dim_to_check)
        out = linear_rows(source.transpose(0, 1), weight, _part(in_proj_bias, index, embed_dim_to_check))
        projected.append(out.unflatten(-1, (num_heads, -1)).transpose(1, 2))
    q, k, v = projected
    if bias_k is not None:
        k, v = (torch.cat([x, _heads(bias, x)], dim=2) for x, bias in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    extra = k.shape[2] - key.shape[0]
    if attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, extra))
    if key_padding_mask is not None:
        key_padding_mask = F.pad(key_padding_mask, (0, extra))
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    scores = _masked(scores, attn_mask, key_padding_mask)
    attention = torch.softmax(scores, dim=-1)
    mixed = (attention @ v).transpose(1, 2).flatten(2)
    out = linear_rows(mixed, out_proj_weight, out_proj_bias).transpose(0, 1).contiguous()
    if not need_weights:
        return out, None
    return out, attention.mean(dim=1) if average_attn_weights else attention


def _heads(bias: Any, keys_RHTd: Tensor) -> Tensor:
    """A learned key or value ``(1, 1, E)`` as one more position of every row."""
    rows, heads, _, _ = keys_RHTd.shape
    return bias.expand(rows, 1, -1).unflatten(-1, (heads, -1)).transpose(1, 2)


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Attention of rows whose mask is a value (a learned bias by position): the mask gets a row for every row."""
    if any(isinstance(x, Value) for x in (query, key, value)) or not isinstance(attn_mask, MemberTensor):
        return NotImplemented
    if query.ndim != 4 or attn_mask.ndim > 4 or not attn_mask.context.is_rows(query.shape[0]):
        return NotImplemented
    members = attn_mask.data_P.shape[0]
    mask_PB = attn_mask.data_P.reshape(members, *([1] * (4 - attn_mask.ndim)), *attn_mask.shape)
    if mask_PB.shape[1] not in (1, query.shape[0] // members):
        return NotImplemented
    mask_R = mask_PB.expand(-1, query.shape[0] // members, -1, -1, -1).flatten(0, 1)
    return F.scaled_dot_product_attention(query, key, value, mask_R, *args, **kwargs)


def _masked(scores_RHTS: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
    if attn_mask is not None:
        if attn_mask.ndim == 3:
            attn_mask = attn_mask.view(scores_RHTS.shape)
        if attn_mask.dtype == torch.bool:
            scores_RHTS = scores_RHTS.masked_fill(attn_mask, -math.inf)
        else:
            scores_RHTS = scores_RHTS + attn_mask
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None, :]
        if padding.dtype == torch.bool:
            scores_RHTS = scores_RHTS.masked_fill(padding, -math.inf)
        else:
            scores_RHTS = scores_RHTS + padding
    return scores_RHTS
