"""What prompts have in common at their beginning, and its KV cache for rows that are padded on the left.

    row i:   [padding k_i][prefix][its own tokens]          k_i = longest row - row i

The prefix's cache is computed once, in columns 0 to p - 1 with positions 0 to p - 1. In row i it begins k_i columns
later; the part that goes beyond column p - 1 is computed again with the row's own tokens. So every row has exactly
the layout, the mask and the positions that it would have without sharing, and no gap between prefix and rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_PREFIX = 16
"""Tokens: below, a second pass over the weights costs more than it saves."""


def common_prefix(ids: Tensor, mask: Tensor) -> int:
    """How many tokens all rows have in common at their beginning; 0 where sharing them is not worth it.

    Args:
        ids: ``(prompts, T)``, padded on the left.
        mask: ``(prompts, T)``, 0 for padding.

    Each row keeps at least one token of its own, since the last token's logits are what a row is computed for.
    """
    if len(ids) < 2:
        return 0
    lengths = mask.sum(-1)
    shortest, width = int(lengths.min()), ids.shape[1]
    columns = (width - lengths).unsqueeze(1) + torch.arange(shortest, device=ids.device)
    aligned = ids.gather(1, columns)
    same = (aligned == aligned[:1]).all(dim=0)
    length = min(int(same.cumprod(0).sum()), shortest - 1)
    return length if length >= MIN_PREFIX else 0


def plain_cache(model: Any) -> Any:
    """An empty cache of keys and values for every column; ``None`` if the model has windows or states instead."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers)
    return growing(cache) if plain else None


def growing(cache: Any) -> Any:
    """An empty cache, its layers with room for tokens to come."""
    from eggroll.llm.generation.cache import GrowingLayer

    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


def spread(cache: Any, owners: Tensor, padding: Tensor) -> Any:
    """``cache`` with a row for each of ``owners``: the keys and values of that row, ``padding`` columns later.

    Args:
        cache: its layers hold ``(members, heads, p, head size)``.
        owners: ``(R,)``, the row of ``cache`` that each new row comes from.
        padding: ``(R,)``; columns before that are never attended to, so it does not matter what they hold.
    """
    length = cache.get_seq_length()
    columns = (torch.arange(length, device=owners.device) - padding.unsqueeze(1)).clamp_min(0)
    for layer in cache.layers:
        # the two index tensors stand side by side, so what they pick keeps its axes: (R, p, heads, head size)
        layer.keys = layer.keys.transpose(1, 2)[owners.unsqueeze(1), columns].transpose(1, 2)
        layer.values = layer.values.transpose(1, 2)[owners.unsqueeze(1), columns].transpose(1, 2)
    return cache


__all__ = ["MIN_PREFIX", "common_prefix", "plain_cache", "spread"]
