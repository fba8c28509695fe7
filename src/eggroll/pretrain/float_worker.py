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
from eggroll.pretrain.memory import FLOAT_MEMBERS
from eggroll.pretrain.model.floating import FloatModel
from eggroll.pretrain.worker import PretrainWorker
from eggroll.torch import Active, Replica
from eggroll.torch.devices import find_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LN_2 = math.log(2.0)


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

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Score members, each on its group's window.

        In their last bits scores depend on which members share a forward pass, so ranges have to begin at multiples of
        ``members_per_forward``.
        """
        options = self.options
        windows, group = self.windows(generation, members)
        read, group_of = torch.from_numpy(windows).long().to(self.device), torch.from_numpy(group).to(self.device)

        def fitness(active: Active) -> Tensor:
            first = active.first - members.start
            window = read[group_of[first : first + active.members]]
            logits = active.split(self.replica.model(window[:, :-1])[0])[:, 0]
            return -_bits(logits, window[:, 1:])[:, options.context :].mean(dim=1)

        step = members_per_forward(options)
        scores = self.replica.population.scores(
            fitness, generation, sigma=sigma, members_per_forward=step, members=members
        )
        tokens = len(members) * (options.tokens + options.context)
        return Evaluation(scores.double().cpu().numpy(), tokens=tokens)

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        return self.replica.apply(record)

    @property
    def update_cosine(self) -> float | None:
        """See :class:`eggroll.loop.Worker`."""
        return self.replica.updater.turning.cosine

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
        """Text that the center generates after a prompt."""
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


def members_per_forward(options: PretrainOptions) -> int:
    """Members that share a forward pass, which the last bits of results depend on."""
    return options.members_per_forward or FLOAT_MEMBERS


def _bits(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log2 p`` of targets ``(rows, T)``."""
    nats = F.cross_entropy(logits.float().flatten(0, -2) * LN_2, targets.flatten(), reduction="none")
    return nats.view(targets.shape) / LN_2
