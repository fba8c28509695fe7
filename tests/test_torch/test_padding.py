"""``nn.TransformerEncoder`` and its relatives with masks: what plain weights give in evaluation mode, zeros too."""

import pytest
import torch
from torch import nn

from eggroll.errors import UnsupportedOperationError
from eggroll.torch import Population


def layer(**options):
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, **options)


class Padded(nn.Module):
    """A part of PyTorch called with a padding mask."""

    def __init__(self, part, *, mask=False):
        super().__init__()
        self.part, self.mask = part, mask

    def forward(self, x, padded):
        more = {}
        if self.mask:
            more = {"mask" if isinstance(self.part, nn.TransformerEncoder) else "src_mask": torch.zeros(5, 5).bool()}
        if isinstance(self.part, nn.Transformer):
            return self.part(x, x, src_key_padding_mask=padded)
        if isinstance(self.part, nn.MultiheadAttention):
            return self.part(x, x, x, key_padding_mask=padded, need_weights=False)[0]
        return self.part(x, src_key_padding_mask=padded, **more)


MODELS = {
    "encoder": lambda: Padded(nn.TransformerEncoder(layer(), 2)),
    "encoder_with_norm": lambda: Padded(nn.TransformerEncoder(layer(), 2, norm=nn.LayerNorm(8))),
    "encoder_norm_first": lambda: Padded(nn.TransformerEncoder(layer(norm_first=True), 2)),
    "encoder_unchecked": lambda: Padded(nn.TransformerEncoder(layer(), 2, mask_check=False)),
    "encoder_not_nested": lambda: Padded(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)),
    "encoder_with_both_masks": lambda: Padded(nn.TransformerEncoder(layer(), 2), mask=True),
    "layer": lambda: Padded(layer()),
    "attention": lambda: Padded(nn.MultiheadAttention(8, 2, batch_first=True)),
    "transformer": lambda: Padded(nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True)),
}


def lengths(name, members):
    """Which positions are padded: at the ends, in the middle for some members, or nowhere."""
    padded = torch.zeros(2 * members, 5, dtype=torch.bool)
    for row in range(2 * members):
        padded[row, 5 - row % 4 :] = True
    if name == "some_in_the_middle":
        padded[2, 1:3], padded[2, 3:] = True, False
    return padded if name != "nowhere" else torch.zeros_like(padded)


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop"])
@pytest.mark.parametrize("mask", ["at_the_ends", "some_in_the_middle"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_positions(name, mask, mode, filled, weights_of):
    if name == "encoder_unchecked" and mask == "some_in_the_middle":
        pytest.skip("mask_check=False is the caller's promise that padding is at the ends")
    compare(filled(MODELS[name]()), mask, mode, weights_of)


@pytest.mark.parametrize("mode", ["rows", "loop"])
def test_only_the_second_layer_is_perturbed(mode, filled, weights_of):
    compare(filled(MODELS["encoder_with_norm"]()), "at_the_ends", mode, weights_of, target_modules=["layers.1"])


def test_nothing_is_padded(filled, weights_of):
    compare(filled(MODELS["encoder"]()), "nowhere", "auto", weights_of)


def compare(model, mask, mode, weights_of, **options):
    model = model.double()
    population = Population(model, population_size=4, sigma=0.1, mode=mode, **options)
    x, padded = torch.randn(8, 5, 8, dtype=torch.float64), lengths(mask, 4)
    expected = []
    for p in range(4):
        rows = slice(2 * p, 2 * p + 2)
        expected.append(torch.func.functional_call(model, weights_of(population, p, 1), (x[rows], padded[rows])))
    try:
        got = population.forward(x, padded, generation=1)
    except (UnsupportedOperationError, RuntimeError):
        assert mode == "vmap"  # some of PyTorch's own checks of masks read numbers
        return
    if mode == "auto":
        assert population.mode == "rows"
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-6, atol=1e-7)
