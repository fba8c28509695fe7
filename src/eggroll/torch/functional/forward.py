"""Layers of a whole population at once: ``x (W + U_p^T V_p)^T`` without any member's weight (EGGROLL section 4)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

from eggroll.errors import ConfigError
from eggroll.torch import low_rank
from eggroll.torch.low_rank_conv import convolution


def perturbed_forward(
    x: Tensor, W: Tensor, b: Tensor | None, perts: Mapping[str, Mapping[str, Tensor]], key: str
) -> Tensor:
    """A linear layer of all members: ``y[p] = x[p] (W + U_p^T V_p)^T + b``.

    The base product is one matrix product over all rows. Where all members have the same input (``x`` expanded, or of
    size 1 in its first dimension) it is made once for all of them.

    Args:
        x: ``(P, *batch, n)``; ``(1, *batch, n)`` is the same input for every member.
        W: ``(m, n)``, the center.
        b: ``(m,)`` or ``None``; not perturbed.
        perts: from :func:`generate_perturbations`.
        key: the name of ``W`` in ``perts``.

    Returns:
        ``(P, *batch, m)``.

    Raises:
        ConfigError: an unknown key, or shapes and dtypes that do not fit.
    """
    u_Prm, v_Prn = _factors(perts, key)
    members = u_Prm.shape[0]
    _check(x, W, b, u_Prm, v_Prn, key, features=x.shape[-1])
    if torch.compiler.is_compiling():
        return linear_op(x, W, b, u_Prm, v_Prn)
    return _linear(x, W, b, u_Prm, v_Prn, members)


def _linear(x: Tensor, W: Tensor, b: Tensor | None, u_Prm: Tensor, v_Prn: Tensor, members: int) -> Tensor:
    place = x.device.type
    if torch.is_autocast_enabled(place):
        low = torch.get_autocast_dtype(place)
        with torch.autocast(place, enabled=False):
            bias = None if b is None else b.to(low)
            return _linear(x.to(low), W.to(low), bias, u_Prm.to(low), v_Prn.to(low), members)
    a_Pmr, b_Pnr = u_Prm.transpose(1, 2), v_Prn.transpose(1, 2)
    if members > 1 and (x.shape[0] == 1 or x.stride(0) == 0):
        return low_rank.linear_shared(x[0], W, a_Pmr, b_Pnr, b)
    return low_rank.linear(x, W, a_Pmr, b_Pnr, b)


@torch.library.custom_op("eggroll::linear", mutates_args=())
def linear_op(x: Tensor, W: Tensor, b: Tensor | None, u_Prm: Tensor, v_Prn: Tensor) -> Tensor:
    """:func:`perturbed_forward` as one operation that ``torch.compile`` keeps whole, so that its kernels are used."""
    return _linear(x, W, b, u_Prm, v_Prn, u_Prm.shape[0])


@linear_op.register_fake
def _(x: Tensor, W: Tensor, b: Tensor | None, u_Prm: Tensor, v_Prn: Tensor) -> Tensor:
    return x.new_empty((u_Prm.shape[0], *x.shape[1:-1], W.shape[0]))


def perturbed_conv2d(
    x: Tensor,
    W: Tensor,
    perts: Mapping[str, Mapping[str, Tensor]],
    key: str,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """A 2-D convolution of all members, with the kernel as a matrix ``(C_out, C_in/groups * k * k)``.

    Args:
        x: ``(P, batch, C, H, W)``, or ``(batch, C, H, W)``: the same images for every member.
        W: ``(C_out, C_in/groups, k, k)``, the center.
        perts: from :func:`generate_perturbations`.
        key: the name of ``W`` in ``perts``.
        bias: ``(C_out,)`` or ``None``; not perturbed.
        stride: as for ``torch.nn.functional.conv2d``, like all that follow.
        padding: a number, a pair, ``"same"`` or ``"valid"``.
        dilation: a number or a pair.
        groups: of channels.

    Returns:
        ``(P, batch, C_out, H', W')``.

    Raises:
        ConfigError: an unknown key, or shapes and dtypes that do not fit.
    """
    u_Prm, v_Prn = _factors(perts, key)
    members = u_Prm.shape[0]
    if x.ndim not in (4, 5) or W.ndim != 4:
        raise ConfigError(
            f"perturbed_conv2d({key!r}): x {tuple(x.shape)} must be (batch, C, H, W) or (pop, batch, C, H, W), and W "
            f"{tuple(W.shape)} (C_out, C_in/groups, k, k)"
        )
    x_PB = x.unsqueeze(0) if x.ndim == 4 else x
    _check(x_PB, W, bias, u_Prm, v_Prn, key, features=W.shape[1:].numel())
    if x_PB.shape[2] != W.shape[1] * groups:
        raise ConfigError(
            f"perturbed_conv2d({key!r}): x {tuple(x.shape)} has {x_PB.shape[2]} channels, W {tuple(W.shape)} with "
            f"groups={groups} takes {W.shape[1] * groups}"
        )
    shared = members > 1 and (x_PB.shape[0] == 1 or x_PB.stride(0) == 0)
    return convolution(
        x_PB[:1] if shared else x_PB,
        W,
        u_Prm.transpose(1, 2),
        v_Prn.transpose(1, 2),
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def _factors(perts: Mapping[str, Mapping[str, Tensor]], key: str) -> tuple[Tensor, Tensor]:
    if key not in perts:
        near = difflib.get_close_matches(key, list(perts), n=2)
        raise ConfigError(
            f"there are no perturbations for {key!r}; perts has {', '.join(map(repr, list(perts)[:8]))}"
            f"{f'. Did you mean {near[0]!r}?' if near else ''}. For a layer that is not perturbed use "
            "torch.nn.functional.linear or conv2d"
        )
    return perts[key]["U"], perts[key]["V"]


def _check(x: Tensor, W: Tensor, bias: Tensor | None, u_Prm: Tensor, v_Prn: Tensor, key: str, *, features: int) -> None:
    members, rank, m = u_Prm.shape
    n = v_Prn.shape[2]
    if v_Prn.shape[:2] != (members, rank):
        raise ConfigError(
            f"{key!r}: U {tuple(u_Prm.shape)} and V {tuple(v_Prn.shape)} must be (pop, rank, out) and (pop, rank, in)"
        )
    if bias is not None and bias.shape != (m,):
        raise ConfigError(f"{key!r}: the bias {tuple(bias.shape)} must be ({m},), one for each output")
    if W.shape[0] != m or W.shape[1:].numel() != n:
        raise ConfigError(
            f"{key!r}: W {tuple(W.shape)} does not fit its perturbations for ({m}, {n}); "
            "generate them with get_weight_shapes(params)"
        )
    if x.ndim < 2 or features != n or x.shape[0] not in (members, 1):
        raise ConfigError(
            f"{key!r}: x {tuple(x.shape)} must be (pop={members}, *batch, in={n}), or (1, *batch, in) for an input "
            "that all members share: x.unsqueeze(0).expand(pop, ...)"
        )
    if x.numel() == 0:
        raise ConfigError(f"{key!r}: x {tuple(x.shape)} is an empty batch; give every member at least one row")
    if not (x.dtype == W.dtype == u_Prm.dtype) and not torch.is_autocast_enabled(x.device.type):
        raise ConfigError(
            f"{key!r}: x is {x.dtype}, W {W.dtype} and the perturbations {u_Prm.dtype}; they must agree "
            "(generate_perturbations(..., dtype=W.dtype))"
        )
