"""From estimates to weights: optimizers against themselves by hand, masters, stochastic rounding, checkpoints."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from eggroll.core.config import ESConfig
from eggroll.errors import CheckpointError, ConfigError
from eggroll.run.run_dir import RunDir
from eggroll.torch.updater import Updater, optimizer_factory, round_stochastically

OPTIMIZERS = ["sgd", "momentum", "adam", "adamw"]
HALF = [torch.bfloat16, torch.float16]
LR = 0.01


def config(optimizer="sgd", **settings):
    return ESConfig(population_size=4, optimizer=optimizer, lr=LR, **settings)


def parameters(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 5), "b.bias": (7,)}
    return {
        name: nn.Parameter((torch.randn(shape, generator=generator) * scale).to(dtype), requires_grad=False)
        for name, shape in shapes.items()
    }


def gradient(name, generation, scale=1.0):
    shape = {"a.weight": (6, 5), "b.bias": (7,)}[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * generation + len(name))) * scale


def updater(params, settings, seed=0):
    return Updater(params, optimizer_factory(settings), rounding=settings.rounding, seed=seed)


def steps(made, generations, *, lr=LR, scale=1.0):
    for generation in generations:
        for name in made.parameters:
            made.step(name, gradient(name, generation, scale), lr=lr, generation=generation)


@pytest.mark.parametrize("settings", [{}, {"rounding": "stochastic"}])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_cosine_of_successive_updates(optimizer, settings):
    params = parameters(torch.bfloat16 if settings else torch.float32)
    made = updater(params, config(optimizer, **settings))
    found, changes = [], []
    for generation in range(4):
        before = torch.cat([p.detach().float().flatten() for p in params.values()])
        steps(made, [generation], lr=10 * LR)
        made.turning.finish()
        found.append(made.turning.cosine)
        changes.append(torch.cat([p.detach().float().flatten() for p in params.values()]) - before)
    assert found[0] is None
    exact = [torch.cosine_similarity(one, other, dim=0).item() for one, other in itertools.pairwise(changes)]
    # what is rounded away counts as well
    assert found[1:] == pytest.approx(exact, abs=0.05 if settings else 1e-4)
    made.load_state_tensors(made.state_tensors())
    steps(made, [4])
    made.turning.finish()
    assert made.turning.cosine is None, "the update before it may be another one"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_optimizer_by_hand(optimizer, weight_decay):
    """The textbook rules in float64; ascent, so the estimate is the negative of a loss's gradient."""
    settings = config(optimizer, weight_decay=weight_decay)
    params = parameters()
    by_hand = {name: p.double().numpy().copy() for name, p in params.items()}
    first, second = ({name: np.zeros_like(w) for name, w in by_hand.items()} for _ in range(2))
    made = updater(params, settings)
    for generation in range(5):
        lr = LR * 0.7**generation
        steps(made, [generation], lr=lr)
        for name, w in by_hand.items():
            g = gradient(name, generation).double().numpy()
            if optimizer == "adamw":
                w *= 1 - lr * weight_decay
            else:
                g = g - weight_decay * w
            if optimizer == "sgd":
                w += lr * g
            elif optimizer == "momentum":
                first[name] = g if generation == 0 else 0.9 * first[name] + g
                w += lr * first[name]
            else:
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9 ** (generation + 1)), second[name] / (1 - 0.999 ** (generation + 1))
                w += lr * m / (np.sqrt(v) + 1e-8)
    for name, w in by_hand.items():
        np.testing.assert_allclose(params[name].numpy(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_norm_is_that_of_the_change(optimizer):
    for dtype, rounding in ((torch.float32, "auto"), (torch.bfloat16, "master"), (torch.bfloat16, "nearest")):
        params = parameters(dtype)
        made = updater(params, config(optimizer, rounding=rounding))
        before = made._targets["a.weight"].double()
        squares = made.step("a.weight", gradient("a.weight", 0), lr=LR, generation=0)
        change = made._targets["a.weight"].double() - before
        assert squares == pytest.approx(float(change.square().sum()), rel=1e-4)
        assert squares > 0


def test_masters_keep_the_steps_that_16_bit_loses():
    """Adam's step of 1e-5 on weights around 0.02: bfloat16 addition changes about one weight in eight and loses the
    rest for good; with masters all of it arrives."""
    generator = torch.Generator().manual_seed(1)
    start = (torch.randn(20_000, generator=generator) * 0.02).to(torch.bfloat16)
    results, changed = {}, {}
    for rounding in ("nearest", "master", "stochastic"):
        parameter = nn.Parameter(start.clone(), requires_grad=False)
        made = Updater({"w": parameter}, optimizer_factory(config("sgd")), rounding=rounding, seed=0)
        for generation in range(200):
            made.step("w", torch.ones(20_000), lr=1e-5, generation=generation)
            if generation == 0:
                changed[rounding] = float((parameter != start).float().mean())
        results[rounding] = float((parameter.double() - start.double()).mean())
    assert changed["nearest"] == pytest.approx(0.12, abs=0.06)
    wanted = 200 * 1e-5
    assert results["nearest"] < 0.4 * wanted
    assert results["master"] == pytest.approx(wanted, rel=0.01)
    assert results["stochastic"] == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masters_follow_the_float32_run(dtype, optimizer):
    half, full = parameters(dtype), {}
    for name, parameter in half.items():
        full[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)
    steps(updater(half, config(optimizer)), range(4))
    steps(updater(full, config(optimizer)), range(4))
    for name in half:
        assert half[name].dtype == dtype
        assert half[name].equal(full[name].to(dtype))


def test_stochastic_rounding_has_the_right_mean():
    """Between two neighbors of bfloat16, each fraction of the way is rounded up with that probability."""
    low = torch.tensor(1.0)
    high = torch.tensor(1.0 + 2**-7)
    generator = torch.Generator().manual_seed(0)
    for fraction in (0.0, 0.1, 0.5, 0.9):
        value = float(low + fraction * (high - low))
        for sign in (1.0, -1.0):
            wide = torch.full((100_000,), sign * value)
            bits = torch.randint(-(2**31), 2**31, wide.shape, generator=generator).to(torch.int32)
            rounded = round_stochastically(wide, bits)
            assert set(rounded.float().abs().unique().tolist()) <= {float(low), float(high)}
            up = float((rounded.float().abs() == high).float().mean())
            assert up == pytest.approx(fraction, abs=4 * 0.5 / 100_000**0.5)


def test_stochastic_rounding_at_the_edges():
    bits = torch.tensor([0, -1, 0xFFFF, 0x7FFF], dtype=torch.int32)
    exact = torch.tensor([0.5, -2.0, 0.0, 1024.0])
    assert round_stochastically(exact, bits).float().equal(exact)
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0])
    got = round_stochastically(special, bits)
    assert got[0] == float("inf")
    assert got[1] == float("-inf")
    assert got[2].isnan()
    tiny = torch.full((4,), 1e-40)
    assert torch.isfinite(round_stochastically(tiny, bits)).all()


def test_stochastic_rounding_is_reproducible():
    def run(seed):
        params = parameters(torch.bfloat16)
        steps(updater(params, config("adam", rounding="stochastic"), seed), range(3), lr=1e-3)
        return params

    one, again, other = run(0), run(0), run(1)
    assert all(one[name].equal(again[name]) for name in one)
    assert not all(one[name].equal(other[name]) for name in one)


def test_stochastic_rounding_is_not_for_float16():
    with pytest.raises(ConfigError) as caught:
        updater(parameters(torch.float16), config(rounding="stochastic"))
    text = 'rounding="stochastic" is for bfloat16, and \'a.weight\' is float16; use rounding="master"'
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        *itertools.product([torch.float32, torch.bfloat16], ["master", "stochastic", "nearest"]),
        *itertools.product([torch.float16], ["master", "nearest"]),
    ],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_continues_from_a_checkpoint_bit_for_bit(tmp_path, optimizer, dtype, rounding):
    settings = config(optimizer, rounding=rounding, weight_decay=0.01)
    whole = parameters(dtype)
    steps(updater(whole, settings), range(6), lr=3e-3)

    half_way = parameters(dtype)
    first = updater(half_way, settings)
    steps(first, range(3), lr=3e-3)
    run = RunDir.create(tmp_path / "run", {})
    tensors = {f"parameter/{name}": parameter.detach() for name, parameter in half_way.items()} | first.state_tensors()
    run.save_checkpoint(3, tensors, {})
    steps(first, [3, 4], lr=3e-3)  # what was saved must not follow

    stored = RunDir.open(tmp_path / "run").latest_checkpoint().load()
    fresh = parameters(dtype, scale=2.0)
    for name, parameter in fresh.items():
        parameter.copy_(stored[f"parameter/{name}"])
    second = updater(fresh, settings)
    second.load_state_tensors(stored)
    steps(second, range(3, 6), lr=3e-3)
    assert all(fresh[name].equal(whole[name]) for name in whole)


def test_missing_masters():
    made = updater(parameters(torch.bfloat16), config("adam"))
    with pytest.raises(CheckpointError) as caught:
        made.load_state_tensors({})
    assert str(caught.value) == (
        "the checkpoint has no float32 master for 2 parameters (a.weight, ...): it was written with another setting of "
        "rounding or dtype; use the same as then"
    )


def test_memory_of_the_roundings():
    """Stochastic rounding exists to have no masters; float32 weights need none of it."""
    assert not updater(parameters(torch.bfloat16), config(rounding="stochastic")).masters
    assert not updater(parameters(), config(rounding="master")).masters
    masters = updater(parameters(torch.bfloat16), config()).masters
    assert {name: master.dtype for name, master in masters.items()} == dict.fromkeys(parameters(), torch.float32)


def test_names_with_slashes(tmp_path):
    """A parameter's name ends at the last slash of a key."""
    params = {"blocks/0/w": nn.Parameter(torch.ones(3), requires_grad=False)}
    made = updater(params, config("adam"))
    made.step("blocks/0/w", torch.ones(3), lr=LR, generation=0)
    other = updater({"blocks/0/w": nn.Parameter(params["blocks/0/w"].clone(), requires_grad=False)}, config("adam"))
    other.load_state_tensors(made.state_tensors())
    for one in (made, other):
        one.step("blocks/0/w", torch.full((3,), -2.0), lr=LR, generation=1)
    assert params["blocks/0/w"].equal(other.parameters["blocks/0/w"])
