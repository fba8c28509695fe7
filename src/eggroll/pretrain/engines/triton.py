"""The engine on CUDA: a chunk of members is one launch of :mod:`eggroll.pretrain.engines.triton_kernel`.

Draws from the table are read in place, at offsets that are hashed on the device; draws of a counter are made first, in
a buffer. The update is that of :mod:`eggroll.pretrain.engines.torch`.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from eggroll.pretrain.engines import triton_kernel
from eggroll.pretrain.engines.torch import Members, TorchEngine
from eggroll.pretrain.engines.triton_kernel import VECTORS, Draws, Weights
from eggroll.pretrain.model.fixed_point import LIMIT

COMPARED = 16
"""Members of the first chunk that are run by plain PyTorch as well."""


class TritonEngine(TorchEngine):
    """See :class:`eggroll.pretrain.engines.base.Engine`.

    A kernel depends on a compiler and a driver, and a wrong kernel would go unnoticed. So the first chunk's first
    members are compared with what plain PyTorch makes of them; where the kernel cannot be compiled, or they differ,
    plain PyTorch takes over, with a warning.

    Attributes:
        fused: whether the kernel is used; ``None`` until the first chunk has decided.
    """

    fused: bool | None = None

    def reload(self) -> None:
        """Read ``params`` again, after they were changed."""
        super().reload()
        self._packed = Weights.pack(self._weights, self.shape)

    def _evaluate(
        self, tokens: Tensor, state: Tensor, members: Members | None, keep_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.fused is None:
            self.fused = self._agrees(tokens, state, members, keep_logits)
        if not self.fused:
            return super()._evaluate(tokens, state, members, keep_logits)
        return self._fused(tokens, state, members, keep_logits)

    def _agrees(self, tokens: Tensor, state: Tensor, members: Members | None, keep_logits: bool) -> bool:
        few = slice(0, COMPARED)
        some = members and Members(members.generation, members.pairs, members.place[few], members.signs[few])
        expected = super()._evaluate(tokens[few], state[few], some, keep_logits)
        try:
            found = self._fused(tokens, state, members, keep_logits)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton's are of many kinds; speed is lost, but no result changes
            problem = f"cannot run here: {error!r}"
        else:
            pairs = [(x[few], y) for x, y in zip(found, expected, strict=True) if x is not None and y is not None]
            if all(torch.equal(x.int(), y.int()) for x, y in pairs):
                return True
            problem = "gives other numbers than plain PyTorch on this device (please report this)"
        warnings.warn(f"the Triton kernel of the integer model {problem}; plain PyTorch is used", RuntimeWarning, 2)
        return False

    def _fused(
        self, tokens: Tensor, state: Tensor, members: Members | None, keep_logits: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        draws = None if members is None else self._draws(members)
        vectors = self._vectors(members)
        return triton_kernel.forward(
            self._packed, self.shape, tokens, state.to(torch.int8), vectors, draws, logits=keep_logits
        )

    def _draws(self, members: Members) -> Draws:
        rank, parameters = self.noise.rank, self.shape.parameters
        if self.noise.kind == "table":
            buffer, offsets = self._noise_table(), self._offsets(parameters, members.generation, members.pairs)
        else:
            lengths = [p.draw_length(rank) for p in parameters]
            made = torch.empty((len(members.pairs), sum(lengths)), dtype=torch.int8, device=self.device)
            starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], device=self.device)
            for p, part in zip(parameters, made.split(lengths, dim=1), strict=True):
                part.copy_(self._draw(p, members.generation, members.pairs).flatten(1))
            rows = torch.arange(len(made), device=self.device)
            buffer, offsets = made, rows * made.shape[1] + starts[:, None]
        return Draws(buffer, offsets[:, members.place], members.signs, rank, self._shift)

    def _vectors(self, members: Members | None) -> Tensor:
        """Norms and biases as the kernel wants them, perturbed: ``(M or 1, 4 L + 1, D)`` int8."""
        names = [f"blocks.{i}.{name}" for i in range(self.shape.n_layers) for name in VECTORS] + ["ln_out"]
        base = torch.stack([self._weights[name] for name in names])
        if members is None:
            return base[None]
        by_name = {p.name: p for p in self.shape.parameters}
        made = torch.empty((len(members.place), *base.shape), dtype=torch.int8, device=self.device)
        for i, name in enumerate(names):
            p = by_name[name]
            both = self._draw(p, members.generation, members.pairs).int()
            product = (both[..., : p.inputs] * both[..., p.inputs :]).sum(dim=1, dtype=torch.int32)
            change = (product[members.place] * members.signs[:, None]) >> self._shift
            made[:, i] = (base[i].int() + change).clamp(-LIMIT, LIMIT)
        return made
