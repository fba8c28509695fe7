"""The network in floating point as a worker, with the usual EGGROLL update (Adam, centered ranks)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from eggroll.core import threefry
from eggroll.core.address import parameter_key
from eggroll.core.records import UpdateRecord
from eggroll.loop import Evaluation
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import Corpus
from eggroll.pretrain.measure import SAMPLES_NAME, lanes_of
from eggroll.pretrain.model.floating import FloatModel
from eggroll.pretrain.worker import PretrainWorker
from eggroll.torch.devices import find_device
from eggroll.torch.population import Active
from eggroll.torch.replica import Replica

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LN_2 = math.log(2.0)
MEMBERS_PER_FORWARD = 256


class FloatWorker(PretrainWorker):
    """The model in fp32 or bf16. A member reads the context itself, as there is no state to begin with."""

    def __init__(self, options: PretrainOptions, corpus: Corpus | None = None) -> None:
        super().__init__(options, corpus)
        self.device = find_device(options.device)
        model = FloatModel(options.shape, options.seed).eval().to(self.device, DTYPES[options.precision])
        self.replica = Replica(model, options.es(), kinds=("matrix", "embedding", "vector"))

    @property
    def engine_name(self) -> str:
        """What runs the model."""
        return f"PyTorch on {self.device}"

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: value.contiguous() for name, value in self.replica.model.state_dict().items()}

    @torch.no_grad()
    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score members, each on its group's window.

        Scores depend on which members share a forward pass, in their last bits: ranges should begin at multiples of
        ``members_per_forward``.
        """
        options, population = self.options, self.replica.population
        windows, group = self.windows(generation, members)
        read = torch.from_numpy(windows).long().to(self.device)
        step = options.members_per_forward or MEMBERS_PER_FORWARD
        population.noise.prepare(generation, population.num_pairs, population.device)
        scores = np.empty(len(members), np.float64)
        for first in range(0, len(members), step):
            part = members[first : first + step]
            with population.perturbed(generation, part, sigma=sigma) as active:
                scores[first : first + step] = self._fitness(active, read[group[first : first + step]])
        return Evaluation(scores, tokens=len(members) * (options.tokens + options.context))

    def _fitness(self, active: Active, windows: Tensor) -> NDArray[np.float64]:
        """Minus the bits per byte of each member after its context, ``(members,)``."""
        logits = active.split(self.replica.model(windows[:, :-1])[0])[:, 0]
        scores = -_bits(logits, windows[:, 1:])[:, self.options.context :].mean(dim=1)
        return scores.double().cpu().numpy()

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        return self.replica.apply(record)

    @torch.no_grad()
    def bits_per_byte(self, stream: NDArray[np.uint8], limit: int | None = None) -> tuple[float, int]:
        """As :func:`eggroll.pretrain.measure.bits_per_byte`, of the center."""
        total, count = 0.0, 0
        for lanes in lanes_of(stream, limit):
            tokens = torch.from_numpy(lanes).long().to(self.device)
            bits = _bits(self.replica.model(tokens[:, :-1])[0], tokens[:, 1:])
            total, count = total + float(bits.double().sum()), count + bits.numel()
        return total / count, count

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int, *, temperature: float = 1.0, seed: int = 0) -> bytes:
        """What the center writes after a prompt."""
        tokens = torch.tensor([[0, *prompt]], device=self.device)
        logits, states = self.replica.model(tokens)
        made = bytearray()
        for word in threefry.random_bits(parameter_key(seed, SAMPLES_NAME), length):
            last = logits[0, -1].double()
            if temperature == 0:
                token = int(last.argmax())
            else:
                shares = (last * LN_2 / temperature).softmax(dim=0).cumsum(dim=0)
                token = min(int(torch.searchsorted(shares, float(word) / 2**32, right=True)), len(shares) - 1)
            made.append(token)
            logits, states = self.replica.model(torch.tensor([[token]], device=self.device), states)
        return bytes(made)

    def state_tensors(self) -> Mapping[str, Tensor]:
        """Parameters, masters and the optimizer's state."""
        return self.replica.state_tensors()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_tensors`."""
        self.replica.load_state_tensors(tensors)


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log2 p`` of targets ``(rows, T)``."""
    nats = F.cross_entropy(logits.float().flatten(0, -2) * LN_2, targets.flatten(), reduction="none")
    return nats.view(targets.shape) / LN_2
