"""The engine in plain PyTorch, on any device, for where the C library cannot be used.

The same integers as :mod:`eggroll.pretrain.oracle`. Products are int32 by ``torch._int_mm`` where that is known to be
exact, and otherwise floating point with room for every partial sum: float32 below 2^24, else float64.
"""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.pretrain import fixed_point, update
from eggroll.pretrain.engine import Result, Step, Work, check_work, empty_result
from eggroll.pretrain.fixed_point import GATE_BITS, LIMIT, LOGIT_OFFSET
from eggroll.pretrain.noise import Noise
from eggroll.pretrain.oracle import noise_shift
from eggroll.pretrain.shape import ModelShape, Parameter
from eggroll.torch.threefry import random_bits

CHUNK = {"cpu": 64, "cuda": 8192}
"""Members at once, by the type of device."""
UPDATE_PAIRS = 1024
"""Pairs whose draws are in memory at once in an update."""

Factors = tuple[Tensor, Tensor]
"""``A (M, rank, outputs)`` with the sign in it, and ``B (M, rank, inputs)``."""


class TorchEngine:
    """See :class:`eggroll.pretrain.engine.Engine`."""

    def __init__(
        self,
        params: dict[str, NDArray[np.int8]],
        shape: ModelShape,
        noise: Noise,
        sigma_shift: int,
        device: str,
        chunk: int | None,
    ) -> None:
        self.params, self.shape, self.noise, self.device = params, shape, noise, torch.device(device)
        self.chunk = chunk or CHUNK.get(self.device.type, CHUNK["cuda"])
        self.momentum: dict[str, NDArray[np.int32]] = {}
        self._shift = noise_shift(noise.rank, sigma_shift)
        self._exp2 = torch.from_numpy(fixed_point.exp2_table()).to(self.device)
        self._log2 = torch.from_numpy(fixed_point.log2_thresholds()).to(self.device)
        self._normals = torch.from_numpy(fixed_point.normal_table()).to(self.device)
        self._table: Tensor | None = None
        self.reload()

    def reload(self) -> None:
        """Take note that ``params`` were changed."""
        self._weights = {name: torch.from_numpy(value).to(self.device) for name, value in self.params.items()}

    def run(self, work: Work) -> Result:
        """Evaluate, a chunk of members at a time."""
        check_work(work, self.shape)
        result = empty_result(work, self.shape)
        for first in range(0, len(work.window), self.chunk):
            part = slice(first, first + self.chunk)
            window = torch.from_numpy(np.ascontiguousarray(work.window[part], np.int64))
            tokens = torch.from_numpy(np.ascontiguousarray(work.tokens, np.uint8))[window].long().to(self.device)
            state = torch.zeros(len(window), self.shape.n_layers, self.shape.hidden, dtype=torch.int32)
            if work.state is not None:
                state = torch.from_numpy(np.ascontiguousarray(work.state, np.int8))[window].int()
            factors: dict[str, Factors] = {}
            if work.pairs is not None:
                assert work.signs is not None
                factors = self._factors(work.generation, work.pairs[part], work.signs[part])
            logits, state = self._forward(tokens[:, :-1], state.to(self.device), factors)
            if result.logits is not None:
                result.logits[part] = logits.to(torch.int8).cpu().numpy()
            if result.state is not None:
                result.state[part] = state.to(torch.int8).cpu().numpy()
            if result.likelihood is not None or result.fitness is not None:
                likelihood = self._log_likelihood(logits, tokens[:, 1:]).cpu().numpy()
                if result.likelihood is not None:
                    result.likelihood[part] = likelihood
                if result.fitness is not None:
                    result.fitness[part] = likelihood.sum(axis=1)
        return result

    def update(self, generation: int, pairs: NDArray[np.int64], fitness: NDArray[np.int8], step: Step) -> int:
        """Move the weights; returns how many have moved."""
        used, moved = np.flatnonzero(fitness), 0
        pairs, scores = pairs[used], torch.from_numpy(fitness[used]).to(self.device)
        for p in self.shape.parameters:
            total = torch.zeros(self.params[p.name].shape, dtype=torch.int32, device=self.device)
            for first in range(0, len(pairs), UPDATE_PAIRS):
                part = slice(first, first + UPDATE_PAIRS)
                total += self._sum(p, self._draw(p, generation, pairs[part]), scores[part], step.sign_of_noise)
            momentum = None
            if step.momentum_shift:
                momentum = self.momentum.setdefault(p.name, np.zeros(total.shape, np.int32))
            moved += update.move(self.params[p.name], total.cpu().numpy(), step, momentum)
        self.reload()
        return moved

    def _sum(self, p: Parameter, draws: Tensor, fitness: Tensor, sign_of_noise: bool) -> Tensor:
        """``Z`` as :func:`eggroll.pretrain.update.sum_of_draws`."""
        if sign_of_noise:
            draws = draws.sign() * fixed_point.ONE
        b = draws[..., : p.inputs].reshape(-1, p.inputs)
        a = _i8((fitness.int()[:, None, None] * draws[..., p.inputs :].int()) >> fixed_point.FIXED_POINT)
        a = a.reshape(-1, p.outputs).to(torch.int8)
        if p.kind == "vector":
            return (a.int() * b.int()).sum(dim=0, dtype=torch.int32)
        left, right = (b, a) if p.kind == "embedding" else (a, b)
        return multiply(left.T, right.T)

    def _draw(self, p: Parameter, generation: int, pairs: NDArray[np.int64]) -> Tensor:
        """``(P, rank, inputs + outputs)`` int8 on the device."""
        length, form = p.draw_length(self.noise.rank), (len(pairs), self.noise.rank, p.inputs + p.outputs)
        if self.noise.kind != "table":
            keys = self.noise.keys(p, generation, pairs)
            words = random_bits(keys, (length + 1) // 2, device=self.device)
            halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], dim=-1).flatten(1)[:, :length]
            return self._normals[halves.long()].view(form)
        if self._table is None:
            self._table = torch.from_numpy(self.noise.table()).to(self.device)
        offsets = torch.from_numpy(self.noise.offsets(p, generation, pairs)).to(self.device)
        return self._table[offsets[:, None] + torch.arange(length, device=self.device)].view(form)

    def _factors(self, generation: int, pairs: NDArray[np.int64], signs: NDArray[np.int32]) -> dict[str, Factors]:
        found, inverse = np.unique(pairs, return_inverse=True)
        member = torch.from_numpy(inverse).to(self.device)
        sign = torch.from_numpy(signs).to(self.device)[:, None, None].to(torch.int8)
        made = {}
        for p in self.shape.parameters:
            both = self._draw(p, generation, found)[member]
            made[p.name] = (both[..., p.inputs :] * sign, both[..., : p.inputs])
        return made

    def _forward(self, tokens: Tensor, state: Tensor, factors: dict[str, Factors]) -> tuple[Tensor, Tensor]:
        """Logits ``(M, T, V)`` and state ``(M, L, D)``, int32."""
        vectors = {p.name: self._vector(p.name, factors) for p in self.shape.parameters if p.kind == "vector"}
        logits = []
        for t in range(tokens.shape[1]):
            state = state * (tokens[:, t] != 0).int()[:, None, None]
            x, states = self._embed(tokens[:, t], factors), []
            for i in range(self.shape.n_layers):
                gru, mlp, s = f"blocks.{i}.gru", f"blocks.{i}.mlp", state[:, i]
                u = _layer_norm(x, vectors[f"blocks.{i}.ln1"])
                f = self._product(u, f"{gru}.Wf", factors) + self._product(s, f"{gru}.Uf", factors)
                gate = _i8(f + vectors[f"{gru}.bf"]) + LIMIT
                kept = (gate * s) >> GATE_BITS
                h = self._product(u, f"{gru}.Wh", factors) + self._product(kept, f"{gru}.Uh", factors)
                s = s + ((gate * (_i8(h + vectors[f"{gru}.bh"]) - s)) >> GATE_BITS)
                states.append(s)
                x = _i8(x + s)
                u = self._product(_layer_norm(x, vectors[f"blocks.{i}.ln2"]), f"{mlp}.up", factors)
                x = _i8(x + self._product(u, f"{mlp}.down", factors))
            state = torch.stack(states, dim=1) if states else state
            logits.append(self._product(_layer_norm(x, vectors["ln_out"]), "head", factors))
        return torch.stack(logits, dim=1), state

    def _product(self, x: Tensor, name: str, factors: dict[str, Factors]) -> Tensor:
        weight = self._weights[name]
        if use_triton(self.device):
            from eggroll.pretrain.product_triton import product

            by, (a, b) = fixed_point.divisor(weight.shape[1]), factors.get(name, (None, None))
            return product(x.to(torch.int8), weight, by, a, b, self._shift).int()
        total = multiply(x.to(torch.int8), weight)
        if factors:
            a, b = factors[name]
            scales = (x[:, None, :] * b.int()).sum(dim=2, dtype=torch.int32)
            total = total + self._term(scales, a)
        by = fixed_point.divisor(weight.shape[1])
        return _i8(torch.div(total, by, rounding_mode="floor"))

    def _term(self, scales: Tensor, a: Tensor) -> Tensor:
        return (scales[:, :, None] * a.int()).sum(dim=1, dtype=torch.int32) >> self._shift

    def _vector(self, name: str, factors: dict[str, Factors]) -> Tensor:
        base = self._weights[name].int()
        if not factors:
            return base
        a, b = factors[name]
        return _i8(base + ((a.int() * b.int()).sum(dim=1, dtype=torch.int32) >> self._shift))

    def _embed(self, tokens: Tensor, factors: dict[str, Factors]) -> Tensor:
        base = self._weights["emb"][tokens].int()
        if not factors:
            return base
        a, b = factors["emb"]
        scales = b.gather(2, tokens[:, None, None].expand(-1, b.shape[1], 1))[:, :, 0].int()
        return _i8(base + self._term(scales, a))

    def _log_likelihood(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``(M, T)`` int32."""
        shifted = logits.long() + LOGIT_OFFSET
        total = self._exp2[shifted].sum(dim=2, dtype=torch.int32)
        bits = torch.searchsorted(self._log2, total, right=True)
        return (shifted.gather(2, targets[:, :, None])[:, :, 0] - bits).int()


def use_triton(device: torch.device) -> bool:
    """Whether products are made by the Triton kernel: on CUDA devices, where Triton is installed."""
    return device.type == "cuda" and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` of int8 ``(rows, n)`` and ``(m, n)``: exact int32, modulo 2^32."""
    n = x.shape[1]
    # With one input, torch._int_mm (2.13, CPU) returns numbers that have nothing to do with the product.
    if x.device.type == "cpu" and n > 1 and _int_mm_is_exact():
        return torch._int_mm(x.contiguous(), weight.T)
    if x.device.type == "cuda":
        # cuBLAS wants at least 17 rows, multiples of 8 otherwise, and rows that lie one after the other.
        rows = max(0, 24 - len(x))
        padding = (0, -n % 8)
        left = torch.nn.functional.pad(x, (*padding, 0, rows)).contiguous()
        right = torch.nn.functional.pad(weight, (*padding, 0, -len(weight) % 8)).contiguous()
        return torch._int_mm(left, right.T)[: len(x), : len(weight)]
    exact = torch.float32 if n * (LIMIT + 1) ** 2 < 2**24 else torch.float64
    return (x.to(exact) @ weight.to(exact).T).to(torch.int64).to(torch.int32)


@functools.cache
def _int_mm_is_exact() -> bool:
    """Whether int8 products are made without saturation here: some CPUs add two products in 16 bits."""
    if not hasattr(torch, "_int_mm"):
        return False
    x = torch.full((17, 96), LIMIT, dtype=torch.int8)
    try:
        found = [int(torch._int_mm(x, (sign * x[:9]).T)[16, 8]) for sign in (1, -1)]
    except RuntimeError:
        return False
    return found == [96 * LIMIT**2, -96 * LIMIT**2]


def _i8(x: Tensor) -> Tensor:
    return x.clamp(-LIMIT, LIMIT)


def _layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    size = (x.abs().sum(dim=1, keepdim=True, dtype=torch.int32) // x.shape[1]).clamp(min=1)
    return _i8(torch.div(x * weight, size, rounding_mode="floor"))
