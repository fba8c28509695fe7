"""The recurrence of RWKV-7 over a whole text: one pass in C on CPUs, blocks of 16 tokens in PyTorch elsewhere.

Per head, with decay w, and a = -kappa, b = kappa * (learning rate in context):

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,      y_t = S_t r_t          (arXiv 2503.14456)
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from eggroll.torch.kernels import compile_c
from eggroll.torch.kernels.native import is_unobserved, thread_entry

BLOCK = 16
"""Tokens that are computed together. The decay of a token is at least exp(-exp(-1/2)) = 0.545, so that of a block's
inverse is at most 16,000, which float32 holds without trouble."""
SOURCE = Path(__file__).with_name("wkv.c")
PARALLEL_FROM = 1 << 17
"""Calls of at least this many multiply-adds are shared out to threads."""


def wkv7(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of all tokens, and the state after the last.

    Args:
        r, log_w, k, v, a, b: ``(R, T, H, N)`` float32; ``log_w`` is the logarithm of the decay, -0.607 to 0.
        state: ``(R, H, N, N)`` float32, values by keys. It is not changed.

    Returns:
        ``y (R, T, H, N)`` and the new state, float32.
    """
    parts = (r, log_w, k, v, a, b, state)
    if all(type(x) is Tensor and x.is_cpu and x.dtype == torch.float32 for x in parts) and _plain(parts):
        library = _library()
        if not isinstance(library, str):
            return _in_c(library, *parts)
    return wkv7_blocks(*parts)


def wkv7_steps(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, token by token: what the others are tested against, in any dtype."""
    outputs = []
    for t in range(r.shape[1]):
        applied = (state * a[:, t, :, None, :]).sum(-1)
        state = (
            state * log_w[:, t, :, None, :].exp()
            + applied.unsqueeze(-1) * b[:, t, :, None, :]
            + v[:, t].unsqueeze(-1) * k[:, t, :, None, :]
        )
        outputs.append((state * r[:, t, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), state


def wkv7_blocks(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence in blocks: everything inside a block is products of matrices, only the state goes step by step.

    With C_t the product of a block's decays up to t, and tilded r C_t, a C_{t-1}, k / C_t, b / C_t:
    ``u = (I - tril(a~ b~^T, -1))^-1 (a~ S_0^T + tril(a~ k~^T, -1) V)`` holds every S_{t-1} a_t, and then
    ``Y = r~ S_0^T + tril(r~ k~^T) V + tril(r~ b~^T) u``, ``S = (S_0 + V^T k~ + u^T b~) C_T``.
    """
    rows, length, heads, size = r.shape
    if length == 1:
        return wkv7_steps(r, log_w, k, v, a, b, state)
    blocks = -(-length // BLOCK)
    missing = blocks * BLOCK - length

    def cut(
        x: Tensor,
    ) -> Tensor:  # (R, H, blocks, BLOCK, N); what is missing changes nothing: k = v = a = b = log_w = 0
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return x.reshape(rows, blocks, BLOCK, heads, size).permute(0, 3, 1, 2, 4)

    r, log_w, k, v, a, b = (cut(x) for x in (r, log_w, k, v, a, b))
    decay = log_w.cumsum(-2)
    inverse = (-decay).exp()
    r, a, k, b = r * decay.exp(), a * (decay - log_w).exp(), k * inverse, b * inverse
    last = decay[..., -1:, :].exp()
    ab, ak = (a @ b.mT).tril(-1), (a @ k.mT).tril(-1)
    rb, rk = (r @ b.mT).tril(), (r @ k.mT).tril()
    eye = torch.eye(BLOCK, dtype=r.dtype, device=r.device)
    solved = torch.linalg.solve_triangular(eye - ab, torch.cat([ak @ v, a], dim=-1), upper=False, unitriangular=True)
    u_own, u_state = solved.split(size, dim=-1)
    y_own = rk @ v + rb @ u_own  # what a block gives without the state before it
    y_state = r + rb @ u_state
    added = (v.mT @ k + u_own.mT @ b) * last
    moved = u_state.mT @ b
    outputs = []
    for block in range(blocks):
        outputs.append(y_own[:, :, block] + y_state[:, :, block] @ state.mT)
        state = (state + state @ moved[:, :, block]) * last[:, :, block] + added[:, :, block]
    y = torch.stack(outputs, dim=2).permute(0, 2, 3, 1, 4).reshape(rows, blocks * BLOCK, heads, size)
    return y[:, :length], state


def _plain(parts: tuple[Tensor, ...]) -> bool:
    return is_unobserved() and not (torch.is_grad_enabled() and any(x.requires_grad for x in parts))


def _in_c(
    run: _Run, r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    rows, length, heads, size = r.shape
    inputs = [x.contiguous() for x in (r, log_w.exp(), k, v, a, b)]
    state = state.clone(memory_format=torch.contiguous_format)
    y = torch.empty_like(inputs[0])
    work = rows * heads * length * size * size * 5
    parts = 1 if work < PARALLEL_FROM or run.parallel is None else min(rows * heads, 4 * torch.get_num_threads())
    pointers = [x.data_ptr() for x in (*inputs, state, y)]
    run.call(*pointers, rows, length, heads, size, parts if torch.get_num_threads() > 1 else 1, run.parallel)
    return y, state


class _Run:
    """The function of the loaded library, and PyTorch's way into its threads (None if it has no such)."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.call = library.eggroll_wkv7
        self.call.argtypes = (*(ctypes.c_void_p,) * 8, *(ctypes.c_int64,) * 5, ctypes.c_void_p)
        self.call.restype = None
        self.parallel = thread_entry()


@functools.cache
def _library() -> _Run | str:
    """The compiled recurrence, or the reason why there is none."""
    flags = ("-fassociative-math", "-fno-signed-zeros", "-ffp-contract=fast", "-Wno-psabi")
    library = compile_c.load("wkv", SOURCE.read_text(encoding="utf-8"), flags)
    return library if isinstance(library, str) else _Run(library)
