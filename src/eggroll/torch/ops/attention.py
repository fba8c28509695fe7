"""Rule for ``torch.nn.MultiheadAttention``, whose projections share one packed weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eggroll.torch.ops.products import linear_rows
from eggroll.torch.ops.registry import context_of, rule
from eggroll.torch.values import MemberTensor, PerturbedWeight, Value


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
    """Attention over time-major rows ``(T, R, E)``; masks as in torch. Rare options go member by member."""
    rare = bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None
    values = (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, q_proj_weight, k_proj_weight, v_proj_weight)
    context = context_of(*values)
    is_value = any(isinstance(x, Value) for x in (query, key, value, attn_mask, key_padding_mask))
    if context.single or rare or is_value or query.ndim != 3 or (training and dropout_p > 0.0):
        return NotImplemented
    if not context.is_rows(query.shape[1]):
        return NotImplemented
    if is_causal and attn_mask is None:
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    projected = []
    for index, source in enumerate((query, key, value)):
        weight = weights[index] if use_separate_proj_weight else _part(in_proj_weight, index, embed_dim_to_check)
        out = linear_rows(source.transpose(0, 1), weight, _part(in_proj_bias, index, embed_dim_to_check))
        projected.append(out.unflatten(-1, (num_heads, -1)).transpose(1, 2))
    q, k, v = projected
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    scores = _masked(scores, attn_mask, key_padding_mask)
    attention = torch.softmax(scores, dim=-1)
    mixed = (attention @ v).transpose(1, 2).flatten(2)
    out = linear_rows(mixed, out_proj_weight, out_proj_bias).transpose(0, 1)
    if not need_weights:
        return out, None
    return out, attention.mean(dim=1) if average_attn_weights else attention


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
