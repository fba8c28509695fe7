"""The same network in floating point (``--precision fp32`` or ``bf16``).

What int8 does in sixteenths is done here in ones: ``x @ W = clip(x W^T / sqrt(n))``, clipping at 127/16, the norm by
the mean of magnitudes, gates ``(16 f + 127) / 256``, and logits in bits. Nothing is rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eggroll.pretrain.model.fixed_point import LIMIT, ONE
from eggroll.pretrain.model.shape import MLP_FACTOR, ModelShape

TOP = LIMIT / ONE
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def scaled(linear: nn.Linear, x: Tensor) -> Tensor:
    """``clip(x W^T / sqrt(n))``."""
    return (linear(x) * linear.in_features**-0.5).clamp(-TOP, TOP)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """``clip(x w / mean|x|)``, the mean at least 1/16."""
    size = x.abs().mean(dim=-1, keepdim=True).clamp(min=1 / ONE)
    return (x / size * weight).clamp(-TOP, TOP)


class FloatBlock(nn.Module):
    """Norm, recurrence, norm, MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.bf, self.bh = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        self.Wf, self.Uf, self.Wh, self.Uh = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.up = nn.Linear(hidden, MLP_FACTOR * hidden, bias=False)
        self.down = nn.Linear(MLP_FACTOR * hidden, hidden, bias=False)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step: ``(rows, D)`` and the state ``(rows, D)``; returns both."""
        u = norm(x, self.ln1)
        f = (scaled(self.Wf, u) + scaled(self.Uf, state) + self.bf).clamp(-TOP, TOP)
        gate = (ONE * f + LIMIT) / 256
        h = (scaled(self.Wh, u) + scaled(self.Uh, gate * state) + self.bh).clamp(-TOP, TOP)
        state = state + gate * (h - state)
        x = (x + state).clamp(-TOP, TOP)
        inner = scaled(self.up, norm(x, self.ln2))
        return (x + scaled(self.down, inner)).clamp(-TOP, TOP), state


class FloatModel(nn.Module):
    """The integer model's network in floating point."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(FloatBlock(shape.hidden) for _ in range(shape.n_layers))
        self.ln_out = nn.Parameter(torch.ones(shape.hidden))
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        generator = torch.Generator().manual_seed(seed % 2**63)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, generator=generator)

    def forward(self, tokens: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits ``(rows, T, V)`` in bits of tokens ``(rows, T)``, and the states ``(rows, D)`` after the last."""
        now: list[Any] = [None] * len(self.blocks) if states is None else list(states)
        logits = []
        for t in range(tokens.shape[1]):
            x, goes_on = self.emb(tokens[:, t]), (tokens[:, t] != 0).unsqueeze(1)
            for i, block in enumerate(self.blocks):
                before = torch.zeros_like(x) if now[i] is None else now[i] * goes_on
                x, now[i] = block(x, before)
            logits.append(scaled(self.head, norm(x, self.ln_out)))
        return torch.stack(logits, dim=1), now
