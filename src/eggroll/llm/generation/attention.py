"""The attention of decoding steps on CPUs: one C call in each layer, for models that take attention functions.

transformers looks a model's attention up by name each time. While text is generated, the name ``sdpa`` is exchanged
for one of ours, which does what ``sdpa`` does, and steps of one new position in C where that can be used
(:mod:`eggroll.torch.kernels.attention_c`). The model itself is not changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from eggroll.torch.kernels import attention_c

NAME = "eggroll_decoding"
_REPLACED = "sdpa"
_ELSEWHERE = ("position_bias", "softcap", "s_aux", "cache", "output_attentions")
"""Arguments of attention functions that the C call knows nothing of."""


@contextmanager
def decoding_attention(model: Any) -> Iterator[bool]:
    """While open, decoding steps of ``model`` take the C call where they can; true if any may."""
    configs = _configs(model)
    if not configs:
        yield False
        return
    _register()
    for config in configs:
        config._attn_implementation_internal = NAME
    try:
        yield True
    finally:
        for config in configs:
            config._attn_implementation_internal = _REPLACED


def _configs(model: Any) -> list[Any]:
    """The configurations of a model's parts that name ``sdpa``; none where another attention cannot be given."""
    first = next(iter(model.parameters()), None)
    if first is None or first.device.type != "cpu" or not getattr(model, "_supports_attention_backend", False):
        return []
    if first.dtype not in (torch.float32, torch.bfloat16) or attention_c.why_not(first.dtype):
        return []
    found = {id(config): config for part in model.modules() if (config := getattr(part, "config", None)) is not None}
    return [each for each in found.values() if getattr(each, "_attn_implementation_internal", None) == _REPLACED]


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        """As transformers' ``sdpa_attention_forward``: queries ``(R, H, T, d)`` to ``(R, T, H, d)``."""
        known = all(given.get(name) is None or given.get(name) is False for name in _ELSEWHERE)
        if known and query.shape[2] == 1 and not given.get("dropout"):
            scale = given.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            made = attention_c.attend(query, key, value, attention_mask, scale)
            if made is not None:
                return made, None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[return-value]

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


__all__ = ["NAME", "decoding_attention"]
