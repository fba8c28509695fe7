"""The engine in plain PyTorch, on any device, for where the C library cannot be used.

The same integers as :mod:`eggroll.pretrain.model.oracle`. Products are int32 by ``torch._int_mm`` where that is known
to be exact, and otherwise floating point with room for every partial sum: float32 below 2^24, else float64.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eggroll.pretrain.engines.base import MOMENTUM_ONE, Result, Step, Work, check_work, empty_result
from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.fixed_point import GATE_BITS, LIMIT, LOGIT_OFFSET
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.oracle import noise_shift
from eggroll.pretrain.model.shape import ModelShape, Parameter
from eggroll.torch.threefry import random_bits

CHUNK = {"cpu": 64, "cuda": 1 << 15}
"""Members at once, by the type of device: on a GPU two blocks of threads for every multiprocessor of a large one."""
UPDATE_PAIRS = {"cpu": 1024, "cuda": 1 << 14}
"""Pairs whose draws are in memory at once in an update."""
SPARSE = 4
"""Draws whose words are made from one key in a row are at most so many times as many as are wanted."""

Factors = tuple[Tensor, Tensor]
"""``A (M, rank, outputs)`` with the sign in it, and ``B (M, rank, inputs)``."""


@dataclass(frozen=True)
class Members:
    """Some members of the population.

    Attributes:
        generation: of their draws.
        pairs: ``(U,)`` the draws that they have.
        place: ``(M,)`` int64 on the device, where among ``pairs`` a member's is.
        signs: ``(M,)`` int32 on the device.
    """

    generation: int
    pairs: NDArray[np.int64]
    place: Tensor
    signs: Tensor


class TorchEngine:
    """See :class:`eggroll.pretrain.engines.base.Engine`."""

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
        self.update_pairs = UPDATE_PAIRS.get(self.device.type, UPDATE_PAIRS["cuda"])
        self.momentum: dict[str, NDArray[np.int32]] = {}
        self._shift = noise_shift(noise.rank, sigma_shift)
        self._exp2 = torch.from_numpy(fixed_point.exp2_table()).to(self.device)
        self._log2 = torch.from_numpy(fixed_point.log2_thresholds()).to(self.device)
        self._normals = torch.from_numpy(fixed_point.normal_table()).to(self.device)
        self._table: Tensor | None = None
        self.reload()

    def reload(self) -> None:
        """Read ``params`` again, after they were changed."""
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
            members = None
            if work.pairs is not None:
                assert work.signs is not None
                found, inverse = np.unique(work.pairs[part], return_inverse=True)
                place, signs = (torch.from_numpy(x).to(self.device) for x in (inverse, work.signs[part]))
                members = Members(work.generation, found, place, signs.int())
            likelihood, state, logits = self._evaluate(
                tokens, state.to(self.device), members, result.logits is not None
            )
            if result.logits is not None:
                assert logits is not None
                result.logits[part] = logits.to(torch.int8).cpu().numpy()
            if result.state is not None:
                result.state[part] = state.to(torch.int8).cpu().numpy()
            if result.likelihood is not None:
                result.likelihood[part] = likelihood.cpu().numpy()
            if result.fitness is not None:
                result.fitness[part] = likelihood.sum(dim=1).cpu().numpy()
        return result

    def update(self, generation: int, pairs: NDArray[np.int64], fitness: NDArray[np.int8], step: Step) -> int:
        """Move the weights; returns how many have moved."""
        used, moved = np.flatnonzero(fitness), 0
        pairs, scores = pairs[used], torch.from_numpy(fitness[used]).to(self.device)
        for p in self.shape.parameters:
            total = torch.zeros(self.params[p.name].shape, dtype=torch.int32, device=self.device)
            for first in range(0, len(pairs), self.update_pairs):
                part = slice(first, first + self.update_pairs)
                total += self._sum(p, self._draw(p, generation, pairs[part]), scores[part], step.sign_of_noise)
            moved += self._move(p.name, total.long(), step)
        self.reload()
        return moved

    def _move(self, name: str, total: Tensor, step: Step) -> int:
        """:func:`eggroll.pretrain.update.move`, on the device."""
        if step.momentum_shift:
            kept = self.momentum.setdefault(name, np.zeros(total.shape, np.int32))
            before = torch.from_numpy(kept).to(self.device).long()
            normalized = torch.div(2 * MOMENTUM_ONE * total + step.unit, 2 * step.unit, rounding_mode="floor")
            total = before - ((before + (1 << (step.momentum_shift - 1))) >> step.momentum_shift) + normalized
            kept[...] = total.cpu().numpy()
        weights = self._weights[name]
        moved = (weights + total.sign() * (total.abs() >= step.limit)).clamp(-LIMIT, LIMIT).to(torch.int8)
        count = int((moved != weights).sum())  # on the CPU ``weights`` are the memory of ``params``
        self.params[name][...] = moved.cpu().numpy()
        return count

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
        offsets = self._offsets((p,), generation, pairs)[0]
        return self._noise_table()[offsets[:, None] + torch.arange(length, device=self.device)].view(form)

    def _noise_table(self) -> Tensor:
        if self._table is None:
            self._table = torch.from_numpy(self.noise.table()).to(self.device)
        return self._table

    def _offsets(self, parameters: Sequence[Parameter], generation: int, pairs: NDArray[np.int64]) -> Tensor:
        """Where in the table draws begin, ``(parameters, pairs)`` int64, as :meth:`Noise.offsets`.

        What an offset is hashed from is one word of a row of random bits that all pairs share, so many are made on the
        device at once, unless the pairs lie far apart.
        """
        first = int(pairs.min()) if len(pairs) else 0
        span = int(pairs.max()) - first + 1 if len(pairs) else 0
        if span > SPARSE * len(pairs) + UPDATE_PAIRS["cpu"]:
            made = np.stack([self.noise.offsets(p, generation, pairs) for p in parameters])
            return torch.from_numpy(made).to(self.device)
        keys = np.array([self.noise.generation_key(p, generation) for p in parameters], np.uint32)
        words = random_bits(keys, span, start=first, device=self.device)
        words = words[:, torch.from_numpy(pairs - first).to(self.device)].long() & 0xFFFFFFFF
        places = torch.tensor([self.noise.places(p) for p in parameters], device=self.device)
        return (words * places[:, None]) >> 32

    def _evaluate(
        self, tokens: Tensor, state: Tensor, members: Members | None, keep_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Windows ``(M, T + 1)`` from states ``(M, L, D)`` int32: log likelihood ``(M, T)``, state, logits."""
        factors = {} if members is None else self._factors(members)
        logits, state = self._forward(tokens[:, :-1], state, factors)
        return self._log_likelihood(logits, tokens[:, 1:]), state, logits

    def _factors(self, members: Members) -> dict[str, Factors]:
        sign, made = members.signs[:, None, None].to(torch.int8), {}
        for p in self.shape.parameters:
            both = self._draw(p, members.generation, members.pairs)[members.place]
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
