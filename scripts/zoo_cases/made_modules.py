"""Hand-made modules that do what public code does, and that were evaluated wrongly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .case import Built, Case, Inputs, fill

WIDTH = 6


class _Made(nn.Module):
    """A linear layer and a head, combined by a function that is the module's forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.cache: dict[str, Tensor] = {}
        self.register_buffer("mean", torch.zeros(WIDTH))
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        """The function's outputs."""
        return self._forward(self, x)


def _keywords(m: Any, x: Tensor) -> Tensor:
    hidden = F.linear(input=x, weight=m.layer.weight, bias=m.layer.bias)
    return m.head(torch.matmul(input=hidden, other=m.layer.weight))


def _kept_in_a_dictionary(m: Any, x: Tensor) -> Tensor:
    return m.head(x @ m.cache.setdefault("w", m.layer.weight.t() * 2))


def _branch_on_a_mean(m: Any, x: Tensor) -> Tensor:
    hidden = m.layer(x)
    return m.head(hidden if hidden.mean() > 0 else -2 * hidden)


def _scores_of_pairs(m: Any, x: Tensor) -> Tensor:
    hidden = m.layer(x)
    return hidden @ (hidden * m.scale).t()


def _mean_of_the_batch(m: Any, x: Tensor) -> Tensor:
    return m.head(m.layer(x)).mean(0)


def _running_mean(m: Any, x: Tensor) -> Tensor:
    hidden = m.layer(x)
    m.mean.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
    return m.head(hidden - m.mean)


def _compared_from_the_left(m: Any, x: Tensor) -> Tensor:
    return m.head(m.layer(x) * (x.transpose(0, 1).transpose(0, 1) <= m.scale).float())


def _mean_and_log_std(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return m.head(torch.tanh(m.layer(x))), m.scale


def _one_output_a_row(m: Any, x: Tensor) -> list[Tensor]:
    return [m.head(row) for row in m.layer(x)]


def _sorted_rows(m: Any, x: Tensor) -> Tensor:
    hidden = m.layer(x)
    return m.head(hidden[hidden[:, 0].argsort()])


def _padding(m: Any, x: Tensor) -> Tensor:
    return F.pad(m.head(m.layer(x)), (0, 2))


def _time_major(m: Any, x: Tensor) -> Tensor:
    steps = torch.stack([x, x * 0.5, x * 2])
    return m.head(m.layer(steps).view(3 * len(x), WIDTH)).view(3, len(x), 4).transpose(0, 1)


MADE: dict[str, Callable[..., Any]] = {
    function.__name__.strip("_"): function
    for function in (
        _keywords,
        _kept_in_a_dictionary,
        _branch_on_a_mean,
        _scores_of_pairs,
        _mean_of_the_batch,
        _running_mean,
        _compared_from_the_left,
        _mean_and_log_std,
        _one_output_a_row,
        _sorted_rows,
        _padding,
        _time_major,
    )
}


class _Padded(nn.Module):
    """PyTorch's encoder with a key padding mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        """Encoded positions; padded ones too."""
        return self.encoder(x, src_key_padding_mask=padding)


class _Recurrent(nn.Module):
    """A recurrent layer that is given a state and returns one, as policies do."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(WIDTH, 5, batch_first=True)  # type: ignore[call-arg]
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Any]:
        """Outputs and the next state."""
        y, state = self.layer(x, state)
        return self.head(y), state


class _Packed(nn.Module):
    """A layer beside integers that are parameters, as packed 4-bit weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)
        self.packed = nn.Parameter(torch.arange(4 * WIDTH, dtype=torch.uint8).view(4, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.layer(x) + x @ (self.packed.float() / 24).t()


def cases() -> Iterator[Case]:
    """One case for each of them."""
    for name, forward in MADE.items():
        yield Case(f"made/{name}", partial(_built, partial(_Made, forward), _flat, [0]))
    yield Case("made/encoder_with_padding", partial(_built, _Padded, _with_padding, [0, 0]))
    yield Case("made/recurrent_state", partial(_built, partial(_Recurrent, nn.GRU), _with_state, [0, 1]))
    yield Case("made/packed_integers", partial(_built, _Packed, _flat, [0]))


def _built(make: Callable[[], nn.Module], inputs: Callable[[int, int], Inputs], dims: list[int | None]) -> Built:
    torch.manual_seed(0)
    return Built(fill(make()), inputs, dims)


def _random(member: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(31 * member + shape[0]))


def _flat(member: int, rows: int) -> Inputs:
    return (_random(member, rows, WIDTH),), {}


def _with_padding(member: int, rows: int) -> Inputs:
    padding = torch.zeros(rows, 7, dtype=torch.bool)
    padding[0, 5:] = True
    return (_random(member, rows, 7, 8), padding), {}


def _with_state(member: int, rows: int) -> Inputs:
    return (_random(member, rows, 3, WIDTH), _random(member + 50, 1, rows, 5)), {}
