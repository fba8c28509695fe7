"""Exactness of plain torch layers: every layout, option and kind of parameter that a module of one's own may use."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

attend = F.scaled_dot_product_attention


class Take(nn.Module):
    """A layer with a head, for layers that return tuples; ``time`` says which dimension is the batch's."""

    def __init__(self, layer, width, *, twice=False):
        super().__init__()
        self.layer, self.head, self.twice = layer, nn.Linear(width, 3), twice

    def forward(self, *args, **kwargs):
        out = self.layer(*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        if self.twice:
            out = self.layer(out, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
        return self.head(out)


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, **options)
        self.head = nn.Linear(16, 3)

    def forward(self, x, memory=None, **kwargs):
        memory = x if memory is None else memory
        out, weights = self.attention(x, memory, memory, **kwargs)
        return (self.head(out),) if weights is None else (self.head(out), weights)


class Cells(nn.Module):
    """A recurrent cell unrolled by hand over a batch-first input."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(8, 3)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Lambda(nn.Module):
    """A function of inputs and of parameters with given shapes."""

    def __init__(self, function, /, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.register_buffer("mask", torch.tril(torch.ones(8, 8)))
        self.function = function

    def forward(self, *args):
        return self.function(self, *args)


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(97, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.bag(ids))


class NanoGPT(nn.Module):
    """Learned positions looked up with a bare ``arange``, tied head, causal attention."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(97, 16), nn.Embedding(64, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=batch_first, norm_first=True)
        self.batch_first = batch_first

    def forward(self, ids):
        time = ids.shape[1]
        x = self.tokens(ids) + self.positions(torch.arange(time))
        mask = nn.Transformer.generate_square_subsequent_mask(time).to(x.dtype)
        if self.batch_first:
            x = self.block(x, src_mask=mask)
        else:
            x = self.block(x.transpose(0, 1), src_mask=mask).transpose(0, 1)
        return F.linear(x, self.tokens.weight)


def convolutions():
    for dims in (1, 2, 3):
        layer = getattr(nn, f"Conv{dims}d")
        transposed = getattr(nn, f"ConvTranspose{dims}d")
        shape = (4, 9, 8, 7)[: dims + 1]
        for name, options in {
            "plain": {},
            "no_bias": dict(bias=False),
            "strided": dict(stride=2, padding=1),
            "dilated": dict(dilation=2),
            "grouped": dict(groups=2),
            "depthwise": dict(groups=4),
            "same": dict(padding="same"),
            "circular": dict(padding=1, padding_mode="circular"),
            "reflect": dict(padding=1, padding_mode="reflect"),
        }.items():
            yield f"conv{dims}d_{name}", functools.partial(layer, 4, 8, 3, **options), shape
        for name, options in {
            "plain": {},
            "strided": dict(stride=2, output_padding=1),
            "grouped": dict(groups=2),
        }.items():
            yield f"conv_transpose{dims}d_{name}", functools.partial(transposed, 4, 6, 3, **options), shape


def sequential(*layers):
    return lambda: nn.Sequential(*(layer() for layer in layers))


LAYERS = {name: (build, shape) for name, build, shape in convolutions()}
LAYERS |= {
    "linear": (lambda: nn.Linear(8, 5), (8,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3)), (8,)),
    "linear_deep_input": (lambda: nn.Linear(8, 5), (2, 3, 4, 8)),
    "bilinear": (lambda: Lambda(lambda m, x: m.bilinear(x, x.flip(-1))), (8,)),
    "prelu": (lambda: nn.Sequential(nn.Linear(8, 6), nn.PReLU(6), nn.Linear(6, 3), nn.PReLU()), (8,)),
    "batch_norm": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)), (4, 6, 6)),
    "batch_norm_1d": (lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), (8,)),
    "group_norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.GroupNorm(3, 6)), (4, 9)),
    "instance_norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, affine=True)), (4, 9)),
    "rms_norm": (lambda: nn.Sequential(nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 2)), (5, 8)),
    "layer_norm_2d": (lambda: nn.Sequential(nn.LayerNorm((3, 8)), nn.Linear(8, 2)), (3, 8)),
    "flatten": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3)), (2, 6, 6)),
    "lstm": (lambda: Take(nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True), 12), (5, 8)),
    "lstm_projected": (lambda: Take(nn.LSTM(8, 6, 2, proj_size=4, bidirectional=True, batch_first=True), 8), (5, 8)),
    "lstm_no_bias": (lambda: Take(nn.LSTM(8, 6, bias=False, batch_first=True), 6), (5, 8)),
    "gru": (lambda: Take(nn.GRU(8, 6, 2, bidirectional=True, batch_first=True), 12), (5, 8)),
    "rnn_tanh": (lambda: Take(nn.RNN(8, 6, 2, bidirectional=True, batch_first=True), 12), (5, 8)),
    "rnn_relu": (lambda: Take(nn.RNN(8, 6, nonlinearity="relu", batch_first=True), 6), (5, 8)),
    "lstm_cell": (lambda: Cells(nn.LSTMCell(8, 8)), (4, 8)),
    "gru_cell": (lambda: Cells(nn.GRUCell(8, 8)), (4, 8)),
    "rnn_cell": (lambda: Cells(nn.RNNCell(8, 8, nonlinearity="relu")), (4, 8)),
    "rnn_cell_no_bias": (lambda: Cells(nn.RNNCell(8, 8, bias=False)), (4, 8)),
    "attention": (lambda: SelfAttention(batch_first=True), (5, 16)),
    "attention_no_bias": (lambda: SelfAttention(batch_first=True, bias=False), (5, 16)),
    "attention_learned_keys": (lambda: SelfAttention(batch_first=True, add_bias_kv=True), (5, 16)),
    "attention_zero_key": (lambda: SelfAttention(batch_first=True, add_zero_attn=True), (5, 16)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        (5, 16),
    ),
    "layer_twice": (lambda: Take(nn.Linear(8, 8), 8, twice=True), (5, 8)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 5)), (8,)),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 5)).eval(), (8,)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"), (8,)),
    "weight_norm_conv": (lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), (4, 9)),
    "weight_norm_old": (lambda: nn.utils.weight_norm(nn.Linear(8, 5)), (8,)),
    "local_response": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.LocalResponseNorm(2)), (4, 6, 6)),
}  # fmt: skip

# Parameters used by hand: name -> (function, shapes of parameters, shape of the input).
BY_HAND = {
    "matmul": (lambda m, x: x @ m.w, dict(w=(8, 5)), (8,)),
    "matmul_3d": (lambda m, x: x @ m.w, dict(w=(8, 5)), (4, 8)),
    "transposed": (lambda m, x: x @ m.w.t() + m.b, dict(w=(5, 8), b=(5,)), (8,)),
    "mT": (lambda m, x: torch.matmul(x, m.w.mT), dict(w=(5, 8)), (6, 8)),
    "columns": (lambda m, x: (m.w @ x.transpose(-1, -2)).transpose(-1, -2), dict(w=(5, 8)), (8,)),
    "columns_3d": (lambda m, x: m.w @ x, dict(w=(5, 8)), (8, 4)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), dict(b=(5,), w=(8, 5)), (8,)),
    "addmm_scaled": (lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0), dict(b=(5,), w=(8, 5)), (8,)),
    "einsum": (lambda m, x: torch.einsum("bd,md->bm", x, m.w), dict(w=(8, 8)), (8,)),
    "einsum_3d": (lambda m, x: torch.einsum("btd,md->btm", x, m.w), dict(w=(5, 8)), (4, 8)),
    "einsum_heads": (lambda m, x: torch.einsum("btd,hdk->bhtk", x, m.w), dict(w=(2, 8, 3)), (4, 8)),
    "einsum_result_transposed": (lambda m, x: torch.einsum("bd,md->mb", x, m.w).T, dict(w=(6, 8)), (8,)),
    "tensordot": (lambda m, x: torch.tensordot(x, m.w, dims=1), dict(w=(8, 5)), (4, 8)),
    "elementwise_2d": (lambda m, x: (x * m.w + m.b).sum(-1), dict(w=(4, 8), b=(1, 8)), (4, 8)),
    "elementwise_reversed": (lambda m, x: m.w / (2 + x.abs()) - m.b, dict(w=(4, 8), b=(8,)), (4, 8)),
    "scalar": (lambda m, x: x * m.s + m.t, dict(s=(), t=(1,)), (8,)),
    "one_value_per_row": (lambda m, x: x.sum(-1) * m.s, dict(s=(1,)), (8,)),
    "exponential": (lambda m, x: x * torch.exp(-m.w.float().abs()).to(x.dtype), dict(w=(8,)), (8,)),
    "gate": (lambda m, x: torch.sigmoid(m.g) * x + (1 - torch.sigmoid(m.g)) * x.tanh(), dict(g=(8,)), (4, 8)),
    "where": (lambda m, x: torch.where(x > 0, x * m.a, m.a), dict(a=(8,)), (4, 8)),
    "lerp": (lambda m, x: torch.lerp(x, m.a, 0.3), dict(a=(8,)), (4, 8)),
    "masked_weight": (lambda m, x: F.linear(x, m.w * m.mask), dict(w=(8, 8)), (8,)),
    "mask_made_inside": (lambda m, x: F.linear(x, m.w * torch.ones(8, 8).tril().to(x.dtype)), dict(w=(8, 8)), (8,)),
    "class_token": (lambda m, x: torch.cat([m.c.expand(x.shape[0], -1, -1), x], 1), dict(c=(1, 1, 8)), (4, 8)),
    "class_token_repeated": (lambda m, x: torch.cat([m.c.repeat(len(x), 1, 1), x], 1), dict(c=(1, 2, 8)), (4, 8)),
    "positions": (lambda m, x: x + m.p[:, : x.shape[1]], dict(p=(1, 16, 8)), (4, 8)),
    "positions_2d": (lambda m, x: x + m.p[: x.shape[1]], dict(p=(16, 8)), (4, 8)),
    "in_place_add": (lambda m, x: (x * 1).add_(m.b).mul_(m.g), dict(b=(8,), g=(8,)), (4, 8)),
    "in_place_operators": (lambda m, x: _in_place(x.clone(), m), dict(b=(8,), g=(4, 8)), (4, 8)),
    "assigned_slice": (lambda m, x: _assign(x.clone(), m.b), dict(b=(8,)), (4, 8)),
    "assigned_mask": (lambda m, x: _assign_mask(x.clone(), m.b), dict(b=(8,)), (4, 8)),
    "learned_query": (lambda m, x: attend(m.q.expand(len(x), -1, -1), x, x), dict(q=(1, 3, 8)), (4, 8)),
    "learned_bias": (lambda m, x: attend(*3 * [x[:, None]], m.b), dict(b=(1, 1, 4, 4)), (4, 8)),
    "learned_bias_2d": (lambda m, x: attend(*3 * [x[:, None]], m.b), dict(b=(4, 4)), (4, 8)),
    "hypernetwork": (lambda m, x: F.linear(x, (m.z @ m.w).view(5, 8)), dict(z=(6,), w=(6, 40)), (8,)),
    "two_weights": (lambda m, x: x @ (m.a @ m.b), dict(a=(8, 6), b=(6, 5)), (4, 8)),
    "new_state": (lambda m, x: _recur(m.w, x), dict(w=(8, 8)), (4, 8)),
    "normalized": (lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.w, dim=-1)), dict(w=(5, 8)), (8,)),
    "distances": (lambda m, x: torch.cdist(x, m.c), dict(c=(5, 8)), (3, 8)),
    "indexed_table": (lambda m, x: x + m.t[torch.tensor([0, 2, 1, 2])], dict(t=(3, 8)), (4, 8)),
    "unbound": (lambda m, x: sum(x * part for part in m.w), dict(w=(3, 8)), (8,)),
    "chunks": (lambda m, x: torch.cat([F.linear(x, part) for part in m.w.chunk(3)], -1), dict(w=(6, 8)), (8,)),
    "data_and_shape": (lambda m, x: x[..., : m.w.data.shape[1]] @ m.w.data.T.to(x.dtype), dict(w=(5, 8)), (8,)),
    "half_of_the_rows": (lambda m, x: F.linear(x, m.w[2:5]), dict(w=(6, 8)), (8,)),
    "windows": (lambda m, x: (x.view(-1, 2, 8) @ m.w).view(*x.shape[:-1], -1), dict(w=(8, 3)), (4, 8)),
    "softmax_weights": (lambda m, x: torch.einsum("bld,l->bd", x, m.w.softmax(0)), dict(w=(4,)), (4, 8)),
    "checkpoint": (lambda m, x: checkpoint(lambda y: F.relu(y @ m.w), x, use_reentrant=False), dict(w=(8, 5)), (8,)),
    "autograd_function": (lambda m, x: Doubled.apply(x, m.w), dict(w=(5, 8)), (8,)),
    "prelu_per_channel": (lambda m, x: F.prelu(x, m.a), dict(a=(4,)), (4, 8)),
    "grid_of_vectors": (lambda m, x: torch.stack([x * m.a, x * m.b], dim=1).flatten(1), dict(a=(8,), b=(8,)), (8,)),
    "bool_comparison": (lambda m, x: x * (x > m.t), dict(t=(8,)), (4, 8)),
}  # fmt: skip


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        return 2 * F.linear(x, weight)


def _in_place(x, m):
    x += m.b
    x *= m.g
    x -= m.b
    x /= 2 + m.b.abs()
    return x


def _assign(x, value):
    x[:, 0] = value
    x[..., 2] = value[2]
    return x


def _assign_mask(x, value):
    x[x.sum(-1) > 0] = value
    return x


def _recur(weight, x):
    state = weight.new_zeros(x.shape[0], weight.shape[0])
    for step in x.unbind(1):
        state = torch.tanh(step + state @ weight)
    return state


POPULATIONS = [
    dict(population_size=4, rank=1, batch=2),
    dict(population_size=5, rank=3, batch=1, antithetic=False),
    dict(population_size=2, rank=2, batch=3),
    dict(population_size=8, rank=1, batch=1),
]


def check(agree, filled, model, shape, **more):
    for options in POPULATIONS:
        options = dict(options)
        batch = options.pop("batch")
        agree(filled(model), ((torch.randn(batch, *shape),), {}), **options, **more)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, agree, filled):
    build, shape = LAYERS[name]
    model = build()
    if name == "bilinear":
        model.bilinear = nn.Bilinear(8, 8, 5)
    check(agree, filled, model, shape)


@pytest.mark.parametrize("name", BY_HAND)
def test_parameters_used_by_hand(name, agree, filled):
    function, shapes, shape = BY_HAND[name]
    check(agree, filled, Lambda(function, **shapes), shape)


@pytest.mark.parametrize("kinds", [("vector", "other"), ("matrix",), ("conv",)])
@pytest.mark.parametrize("name", ["lstm", "gru_cell", "attention", "encoder", "batch_norm", "conv2d_grouped", "mlp"])
def test_some_kinds_of_parameters(name, kinds, agree, filled):
    from eggroll.torch.parameters import parameter_specs

    build, shape = LAYERS[name]
    model = build()
    if not any(spec.kind in kinds for spec in parameter_specs(model)):
        pytest.skip("the layer has no such parameters")
    check(agree, filled, model, shape, kinds=kinds)


@pytest.mark.parametrize("time", [1, 5, 8, 16])
@pytest.mark.parametrize("layer", ["lstm", "gru", "encoder", "linear"])
def test_time_major(layer, time, agree, filled):
    model = {
        "lstm": lambda: Take(nn.LSTM(8, 6, 2, bidirectional=True), 12),
        "gru": lambda: Take(nn.GRU(8, 6), 6),
        "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
        "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    }[layer]()
    for size, batch in ((4, 2), (8, 1), (2, 2)):
        x = torch.randn(time, batch, 8)
        agree(filled(model), ((x,), {}), population_size=size, batch_dim=1)


@pytest.mark.parametrize("time", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("batch_first", [True, False])
def test_learned_positions_at_any_length(time, batch_first, agree, filled):
    for size, batch in ((4, 2), (8, 1), (2, 2)):
        agree(filled(NanoGPT(batch_first)), ((torch.randint(3, 97, (batch, time)),), {}), population_size=size)


@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both", "per_head"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_masks(masks, need_weights, agree, filled):
    model = filled(SelfAttention(batch_first=True, add_bias_kv=masks == "both"))
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    options = {
        "none": {},
        "bool": dict(attn_mask=causal),
        "float": dict(attn_mask=torch.randn(5, 5)),
        "padding": dict(key_padding_mask=padding),
        "both": dict(attn_mask=causal, key_padding_mask=padding),
        "per_head": dict(attn_mask=torch.randn(2 * 4, 5, 5)),
    }[masks]
    shared = ("attn_mask",) if masks in ("bool", "float", "both") else ()
    agree(
        model, ((torch.randn(2, 5, 16),), {**options, "need_weights": need_weights}), population_size=4, shared=shared
    )


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_other_widths_of_keys_and_values(batch_first, agree, filled):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=batch_first)

        def forward(self, x, keys, values):
            return self.attention(x, keys, values, average_attn_weights=False)[0]

    shape = (2, 5) if batch_first else (5, 2)
    inputs = [torch.randn(*shape, width) for width in (16, 6, 10)]
    agree(filled(Cross()), (tuple(inputs), {}), population_size=6, batch_dim=0 if batch_first else 1)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags(mode, agree, filled):
    for size, batch in ((4, 2), (5, 1)):
        ids = torch.randint(3, 97, (batch, 5))
        agree(filled(Bag(mode)), ((ids,), {}), population_size=size, antithetic=size % 2 == 0)


def test_float32_layers(agree, filled):
    for name in ("mlp", "conv2d_plain", "lstm", "attention", "encoder", "weight_norm"):
        build, shape = LAYERS[name]
        agree(filled(build()), ((torch.randn(2, *shape),), {}), dtype=torch.float32)
