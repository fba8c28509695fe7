"""Rules for ``nn.RNN``, ``nn.GRU``, ``nn.LSTM`` and their cells: input products for all steps at once, then a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.ops.per_member import per_member
from eggroll.torch.ops.products import linear_rows
from eggroll.torch.ops.registry import context_of, rule
from eggroll.torch.perturbed import WAYS_OUT, Value

Step = Callable[[Tensor, Tensor, "tuple[Tensor, ...]"], "tuple[Tensor, ...]"]


def _lstm_step(gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gates_x + gates_h).chunk(4, dim=-1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_step(gates_x: Tensor, gates_h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    r_x, z_x, n_x = gates_x.chunk(3, dim=-1)
    r_h, z_h, n_h = gates_h.chunk(3, dim=-1)
    update = torch.sigmoid(z_x + z_h)
    candidate = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return (candidate + update * (state[0] - candidate),)


def _rnn_step(activation: Callable[[Tensor], Tensor]) -> Step:
    return lambda gates_x, gates_h, state: (activation(gates_x + gates_h),)


_STEPS: dict[Any, Step] = {
    torch.lstm: _lstm_step,
    torch.gru: _gru_step,
    torch.rnn_tanh: _rnn_step(torch.tanh),
    torch.rnn_relu: _rnn_step(torch.relu),
}
_CELLS: dict[Any, Step] = {
    torch.lstm_cell: _lstm_step,
    torch.gru_cell: _gru_step,
    torch.rnn_tanh_cell: _rnn_step(torch.tanh),
    torch.rnn_relu_cell: _rnn_step(torch.relu),
}


def _layer(
    x_RT: Tensor, state: tuple[Tensor, ...], weights: list[Any], step: Step, *, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    projection = weights.pop() if len(weights) in (3, 5) else None
    w_ih, w_hh, *biases = weights
    b_ih, b_hh = biases or (None, None)
    gates_x = linear_rows(x_RT, w_ih, b_ih)
    outputs: list[Tensor] = []
    times = range(x_RT.shape[1])
    for time in reversed(times) if reverse else times:
        state = step(gates_x[:, time], linear_rows(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (linear_rows(state[0], projection), *state[1:])
        outputs.append(state[0])
    if reverse:
        outputs.reverse()
    return torch.stack(outputs, dim=1), state


def _recurrent(func: Callable[..., Any]) -> Callable[..., Any]:
    step = _STEPS[func]

    def apply(
        x: Any,
        hx: Any,
        weights: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        if not isinstance(has_biases, bool):
            return _packed(
                func, (x, hx, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first)
            )
        context = context_of(*weights)
        directions = 2 if bidirectional else 1
        per_layer = len(weights) // (num_layers * directions)
        if context.single or isinstance(x, Value) or (training and dropout > 0.0):
            return NotImplemented
        x_RT = x if batch_first else x.transpose(0, 1)
        if not context.is_rows(x_RT.shape[0]):
            arguments = (x, hx, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first)
            return per_member(func, arguments, {}, layout="shared")
        states = hx if isinstance(hx, tuple | list) else (hx,)
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                chosen = list(weights[index * per_layer : (index + 1) * per_layer])
                start = tuple(part[index] for part in states)
                out, final = _layer(x_RT, start, chosen, step, reverse=direction == 1)
                outputs.append(out)
                finals.append(final)
            x_RT = torch.cat(outputs, dim=-1)
        last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return x_RT if batch_first else x_RT.transpose(0, 1).contiguous(), *last

    return apply


def _packed(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The form for packed sequences, ``(data, batch_sizes, hx, weights, ...)``: rows are regrouped by length."""
    values = [weight for weight in args[3] if isinstance(weight, Value)]
    if values[0].context.single:
        return NotImplemented
    name = values[0].parameter
    raise UnsupportedOperationError(
        f"parameter {name!r} is perturbed and its recurrent layer is given a packed sequence, whose rows are regrouped "
        "by length, so that a row's member is not known. Pad instead of packing, or: " + WAYS_OUT.format(name=name)
    )


def _cell(func: Callable[..., Any]) -> Callable[..., Any]:
    step = _CELLS[func]

    def apply(x: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        context = context_of(w_ih, w_hh, b_ih, b_hh)
        if context.single or isinstance(x, Value):
            return NotImplemented
        if x.ndim != 2 or not context.is_rows(x.shape[0]):
            return per_member(func, (x, hx, w_ih, w_hh, b_ih, b_hh), {}, layout="shared")
        states = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        state = step(linear_rows(x, w_ih, b_ih), linear_rows(states[0], w_hh, b_hh), states)
        return state if len(state) > 1 else state[0]

    return apply


for _func in _STEPS:
    rule(_func)(_recurrent(_func))
for _func in _CELLS:
    rule(_func)(_cell(_func))
