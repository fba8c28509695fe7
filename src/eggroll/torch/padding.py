"""``nn.TransformerEncoder`` with a padding mask, as it is for plain weights in evaluation mode.

There, PyTorch computes only the positions that are not padded (as a nested tensor) and fills the others with zeros
before the last norm. It does not do so for tensor subclasses such as values, whose padded positions would hold numbers
without a meaning. What is left of the fast path then is to write these zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.torch.perturbed import Value


@contextmanager
def padding_as_in_plain_models(model: nn.Module) -> Iterator[None]:
    """Inside the block, encoders whose parameters are values pad their outputs as those with plain weights do."""
    handles = []
    try:
        for encoder in [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]:
            if len(encoder.layers) and getattr(encoder, "use_nested_tensor", False):
                handles += _hooks(encoder)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(encoder: nn.TransformerEncoder) -> list[Any]:
    running: list[int] = []  # the number of members of each call; 0 for plain weights

    def before(*_: Any) -> None:
        values = [p for p in encoder.parameters() if isinstance(p, Value)] if encoder.use_nested_tensor else []
        running.append((values[0].context.members or 1) if values else 0)
        if values:
            encoder.use_nested_tensor = False  # also where the values are in later layers only

    def after(*_: Any) -> None:
        if running.pop():
            encoder.use_nested_tensor = True

    def last_layer(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        padding = kwargs.get("src_key_padding_mask")
        if padding is None or not running or not running[-1] or not isinstance(output, Tensor):
            return None
        if kwargs.get("src_mask") is not None or output.ndim != 3 or not _would_be_nested(encoder):
            return None
        return output.masked_fill(_cut_off(padding, running[-1], encoder)[..., None], 0.0)

    return [
        encoder.register_forward_pre_hook(before),
        encoder.register_forward_hook(after, always_call=True),
        encoder.layers[-1].register_forward_hook(last_layer, with_kwargs=True),
    ]


def _would_be_nested(encoder: nn.TransformerEncoder) -> bool:
    """Whether plain weights would take the path of nested tensors (the conditions of its ``forward``)."""
    first = encoder.layers[0]
    needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in first.parameters())
    return (
        torch.backends.mha.get_fastpath_enabled()
        and not first.training
        and not torch.is_autocast_enabled()
        and not needs_grad
    )


def _cut_off(padding_RT: Tensor, members: int, encoder: nn.TransformerEncoder) -> Tensor:
    """The positions that are filled with zeros: all that are padded, if a member's rows are padded at their ends."""
    padded_RT = padding_RT if padding_RT.dtype == torch.bool else padding_RT != 0
    if not getattr(encoder, "mask_check", True):
        return padded_RT
    at_the_end_R = (padded_RT[:, 1:] | ~padded_RT[:, :-1]).all(1)
    count = members if len(at_the_end_R) % members == 0 else 1
    member_P1 = at_the_end_R.view(count, -1).all(1, keepdim=True)
    return padded_RT & member_P1.expand(-1, len(at_the_end_R) // count).reshape(-1, 1)
