"""The same network in floating point (``--precision fp32`` or ``bf16``), with the usual EGGROLL update.

What int8 does in sixteenths is done here in ones: ``x @ W = clip(x W^T / sqrt(n))``, clipping at 127/16, the norm by
the mean of magnitudes, gates ``(16 f + 127) / 256``, and logits in bits. Nothing is rounded.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from eggroll.core import threefry
from eggroll.core.address import parameter_key
from eggroll.core.config import ESConfig
from eggroll.loop import Evaluation, fitness_metrics
from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.data import Corpus, window_starts, windows
from eggroll.pretrain.measure import SAMPLES_NAME, lanes_of
from eggroll.pretrain.model.fixed_point import LIMIT, ONE
from eggroll.pretrain.model.shape import MLP_FACTOR, ModelShape
from eggroll.torch.devices import find_device
from eggroll.torch.es import Replica
from eggroll.torch.population import Active

TOP = LIMIT / ONE
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LN_2 = math.log(2.0)


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
    """The integer model's twin."""

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


class FloatLearner:
    """See :class:`eggroll.loop.Learner`. A member reads the context itself, as there is no state to begin with."""

    def __init__(self, options: PretrainOptions, corpus: Corpus | None) -> None:
        self.options, self.corpus = options, corpus
        self.device = find_device(options.device)
        model = FloatModel(options.shape, options.seed).eval().to(self.device, DTYPES[options.precision])
        self.config = ESConfig(
            population_size=options.pop_size, rank=options.rank, sigma=2.0**-options.sigma_shift, lr=options.lr,
            generations=options.generations, optimizer="adam", fitness_shaping="centered_rank",
            lr_schedule="cosine", noise_reuse=options.noise_reuse, seed=options.seed,
        )  # fmt: skip
        self.replica = Replica(model, self.config, kinds=("matrix", "embedding", "vector"))
        self.engine = self.replica  # what runs it, as whoever shows a run asks every learner
        self.apply = self.replica.apply
        self.state_tensors = self.replica.state_tensors
        self.load_state_tensors = self.replica.load_state_tensors

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return {name: value.contiguous() for name, value in self.replica.model.state_dict().items()}

    def evaluate(self, generation: int, sigma: float) -> Evaluation:
        """Score all members, each on its group's window."""
        options, corpus = self.options, self.corpus
        assert corpus is not None, "a learner without data can only replay"
        length, groups = options.context + options.tokens + 1, options.pop_size // options.group_size
        starts = window_starts(corpus.train, groups, length, seed=options.seed, generation=generation)
        read = torch.from_numpy(windows(corpus.train, starts, length)).long().to(self.device)

        def fitness(active: Active) -> Tensor:
            group = torch.arange(active.first, active.first + active.members, device=self.device)
            window = read[group // options.group_size]
            logits = active.split(self.replica.model(window[:, :-1])[0])[:, 0]
            return -self._bits(logits, window[:, 1:])[:, options.context :].mean(dim=1)

        scores = self.replica.population.scores(
            fitness, generation, sigma=sigma, members_per_forward=options.members_per_forward or 256
        )
        found = scores.double().cpu().numpy()
        tokens = options.pop_size * (options.tokens + options.context)
        return Evaluation(found, fitness_metrics(found), tokens=tokens)

    @staticmethod
    def _bits(logits: Tensor, targets: Tensor) -> Tensor:
        """``-log2 p`` of targets ``(rows, T)``."""
        nats = F.cross_entropy(logits.float().flatten(0, -2) * LN_2, targets.flatten(), reduction="none")
        return nats.view(targets.shape) / LN_2

    @torch.no_grad()
    def bits_per_byte(self, stream: NDArray[np.uint8], limit: int | None = None) -> tuple[float, int]:
        """As :func:`eggroll.pretrain.measure.bits_per_byte`, of the center."""
        total, count = 0.0, 0
        for lanes in lanes_of(stream, limit):
            tokens = torch.from_numpy(lanes).long().to(self.device)
            bits = self._bits(self.replica.model(tokens[:, :-1])[0], tokens[:, 1:])
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
