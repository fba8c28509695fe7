"""The functional API against materialized members, Population, EGGROLL and the float64 oracle; and its errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eggroll.core import oracle
from eggroll.core.fitness import NonFiniteFitnessWarning, centered_rank
from eggroll.core.select import ParameterSpec
from eggroll.errors import ConfigError, RewardError, SelectionError, UnsupportedOperationError
from eggroll.torch import EGGROLL, Population
from eggroll.torch import functional as f

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def materialized(weight, perts, key, member):
    """A member's weight in float64."""
    u, v = (perts[key][factor][member].double() for factor in ("U", "V"))
    return weight.double() + (u.T @ v).view(weight.shape)


def close(got, expected, dtype):
    assert got.shape == expected.shape
    assert got.dtype == dtype
    scale = expected.abs().max().clamp_min(1e-6)
    assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


SIZES = st.integers(1, 9)


@given(
    pairs=st.integers(1, 3), rank=st.integers(1, 9), n=SIZES, m=SIZES, batch=st.lists(st.integers(1, 3), max_size=3),
    dtype=st.sampled_from(list(TOLERANCE)), with_bias=st.booleans(), antithetic=st.booleans(),
    layout=st.sampled_from(["own", "expanded", "one", "strided"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_linear_layer_equals_its_materialized_members(
    pairs, rank, n, m, batch, dtype, with_bias, antithetic, layout, seed
):
    """Population 2, ranks above both dimensions, in or out of 1, any batch dimensions, any layout of the input."""
    torch.manual_seed(seed)
    members = 2 * pairs if antithetic else pairs
    weight = torch.randn(m, n).to(dtype)
    bias = torch.randn(m).to(dtype) if with_bias else None
    perts = f.generate_perturbations({"w": (m, n)}, members, rank, 0.3, generator(seed), dtype, antithetic=antithetic)
    x = torch.randn(members, *batch, n).to(dtype)
    if layout == "expanded":
        x = x[:1].expand(members, *batch, n)
    elif layout == "one":
        x = x[:1]
    elif layout == "strided":
        x = torch.randn(members, *batch, 2 * n).to(dtype)[..., ::2]
    y = f.perturbed_forward(x, weight, bias, perts, "w")
    inputs = x.expand(members, *batch, n).double()
    expected = torch.stack([inputs[p] @ materialized(weight, perts, "w", p).T for p in range(members)])
    expected = expected if bias is None else expected + bias.double()
    magnitude = inputs.abs().amax() * n + 1  # of the terms that a result is summed from
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= 4 * TOLERANCE[dtype] * magnitude


@given(
    pairs=st.integers(1, 2), rank=st.integers(1, 3), groups=st.sampled_from([1, 2]), kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2, (2, 1)]), padding=st.sampled_from([0, 1, (1, 0), "same", "valid"]),
    dilation=st.sampled_from([1, 2]), shared=st.sampled_from(["own", "images", "expanded"]), with_bias=st.booleans(),
    alone=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_a_convolution_equals_its_materialized_members(
    pairs, rank, groups, kernel, stride, padding, dilation, shared, with_bias, alone, dtype
):
    if padding == "same" and stride != 1:
        stride = 1
    torch.manual_seed(0)
    members, batch = 2 * pairs, 2
    weight = torch.randn(4, 2 // groups * 2, kernel, kernel).to(dtype)
    bias = torch.randn(4).to(dtype) if with_bias else None
    shapes = f.get_weight_shapes({"k": weight})
    perts = f.generate_perturbations(shapes, members, rank, 0.3, generator(), dtype)
    x = torch.randn(members, batch, weight.shape[1] * groups, 7, 6).to(dtype)
    given_x = {"own": x, "images": x[0], "expanded": x[:1].expand(x.shape)}[shared]
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eggroll.torch.low_rank_conv.MIN_WORK_ALONE", 0 if alone else 2**40)
        patch.setattr("eggroll.torch.low_rank_conv.KERNEL_BYTES", 3 * weight.numel() * weight.element_size())
        y = f.perturbed_conv2d(given_x, weight, perts, "k", bias, **settings)
    inputs = x if shared == "own" else x[:1].expand(x.shape)
    expected = torch.stack(
        [F.conv2d(inputs[p].double(), materialized(weight, perts, "k", p), None, **settings) for p in range(members)]
    )
    expected = expected if bias is None else expected + bias.double().view(-1, 1, 1)
    assert y.shape == expected.shape
    allowed = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    assert (y.double() - expected).abs().max() <= allowed * expected.abs().max()


@given(
    pairs=st.integers(1, 5), rank=st.integers(1, 6), n=SIZES, m=SIZES,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
def test_gradients_are_the_sum_over_members_and_have_its_rank(pairs, rank, n, m, dtype):
    members = 2 * pairs
    perts = f.generate_perturbations({"w": (m, n)}, members, rank, 0.3, generator(), dtype, antithetic=False)
    fitness = torch.randn(members, generator=generator(1))
    gradient = f.compute_gradients(fitness, perts, members)["w"]
    u, v = perts["w"]["U"].double(), perts["w"]["V"].double()
    each = torch.einsum("p,prm,prn->pmn", fitness.double(), u, v)
    expected = each.sum(0) / members**0.5
    assert gradient.dtype == torch.promote_types(dtype, torch.float32)
    assert (gradient.double() - expected).abs().max() <= 1e-5 * each.abs().max() * members**0.5
    if dtype == torch.float64:
        assert torch.linalg.matrix_rank(gradient) == min(members * rank, m, n)


def test_a_product_of_sums_is_not_the_sum_of_products():
    """One of the sources says it is: that has the cross terms of different members, and rank r."""
    perts = f.generate_perturbations({"w": (12, 10)}, 8, 2, 1.0, generator(), torch.float64, antithetic=False)
    fitness = torch.randn(8, generator=generator(1), dtype=torch.float64)
    right = f.compute_gradients(fitness, perts)["w"]
    u, v = perts["w"]["U"], perts["w"]["V"]
    weighted = fitness.view(-1, 1, 1)
    wrong = (weighted * u).sum(0).T @ (weighted * v).sum(0)
    assert torch.linalg.matrix_rank(wrong) == 2
    assert torch.linalg.matrix_rank(right) == 10
    cosine = F.cosine_similarity(right.flatten(), wrong.flatten(), dim=0)
    assert cosine.abs() < 0.9


def test_perturbations_have_unit_variance_times_sigma_and_halves_of_opposite_sign():
    """20 draws of 20 x 50 entries: sigma is estimated to 2.1 % and the mean to 0.7 % of it; the bounds are 5 %."""
    perts = f.generate_perturbations({"w": (20, 50)}, 40, 4, 0.3, generator())
    u, v = perts["w"]["U"], perts["w"]["V"]
    assert u.shape == (40, 4, 20)
    assert v.shape == (40, 4, 50)
    assert torch.equal(u[:20], -u[20:])
    assert torch.equal(v[:20], v[20:])
    noise = torch.einsum("prm,prn->pmn", u[:20], v[:20])
    assert abs(noise.std().item() / 0.3 - 1) < 0.05
    assert abs(noise.mean().item()) < 0.3 * 0.05


def test_a_generator_is_advanced_and_repeats_itself():
    shapes = {"a": (3, 4), "b": (2, 3)}
    source = generator()
    first, second = (f.generate_perturbations(shapes, 4, 2, 0.1, source) for _ in range(2))
    again = f.generate_perturbations(shapes, 4, 2, 0.1, generator())
    for key in shapes:
        assert torch.equal(first[key]["U"], again[key]["U"])
        assert not torch.equal(first[key]["U"], second[key]["U"])
    assert not torch.equal(first["a"]["V"][:, :, :3], first["b"]["V"][:, :, :3])


HALVES = [0, 3, 1, 4, 2, 5]
"""Member p of a Population of 6 (pairs side by side) is member HALVES[p] here (halves)."""


@pytest.mark.parametrize("rank", [1, 3])
def test_functional_population_trainer_and_oracle_agree_on_the_same_noise(rank):
    """The same address: the same perturbation, output, estimate and step, the oracle's to float32 rounding."""
    torch.manual_seed(0)
    sigma, lr, seed = 0.2, 0.5, 7
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).eval()
    params = {name: value.clone() for name, value in f.get_params_dict(model).items()}
    perts = f.generate_perturbations(f.get_weight_shapes(params), 6, rank, sigma, f.NoiseKey(seed))
    x = torch.randn(2, 5)
    fitness = torch.tensor([3.0, 1.0, -2.0, 0.5, 0.25, 4.0])

    population = Population(model, population_size=6, rank=rank, sigma=sigma, seed=seed)
    with population.perturbed(0) as active, torch.no_grad():
        theirs = active.split(model(active.expand(x)))
    forward, clean = f.make_perturbed_forward_fn(model)
    ours = forward(x[None], params, perts)
    torch.testing.assert_close(ours[HALVES], theirs, rtol=1e-6, atol=1e-6)
    h = torch.tanh(f.perturbed_forward(x[None], params["0.weight"], None, perts, "0.weight"))
    torch.testing.assert_close(f.perturbed_forward(h, params["2.weight"], None, perts, "2.weight"), ours)
    torch.testing.assert_close(clean(x, params), model(x))

    halves = torch.empty(6)
    halves[HALVES] = fitness
    shaped = f.normalize_fitnesses(halves)
    assert torch.equal(shaped[HALVES].double(), torch.from_numpy(centered_rank(fitness.numpy())).float().double())
    grads = f.compute_gradients(shaped, perts, 6)

    scores = iter(fitness.tolist())
    trainer = EGGROLL(
        model.parameters(), model=model, fitness_fn=lambda _: next(scores), population_size=6, rank=rank, sigma=sigma,
        learning_rate=lr, seed=seed, noise_reuse=2, fitness_shaping="centered_rank",
    )  # fmt: skip
    trainer.step()
    # HyperscaleES' scale: sigma sqrt(N) times the es_gradient.
    f.update_params(params, grads, lr / (sigma * 6**0.5))
    for name, parameter in model.named_parameters():
        spec = ParameterSpec(name, tuple(parameter.shape), "matrix")
        weights = centered_rank(fitness.numpy())
        exact = oracle.es_gradient(spec, weights, rank=rank, seed=seed, generation=0)
        estimate = grads[name].double().numpy() / (sigma * 6**0.5)
        assert np.abs(estimate - exact).max() <= 2e-6 * np.abs(exact).max()
        torch.testing.assert_close(params[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_noise_of_an_address_is_a_function_of_it():
    shapes = {"a": (3, 4)}

    def drawn(key):
        return f.generate_perturbations(shapes, 4, 2, 0.1, key)["a"]["U"]

    assert torch.equal(drawn(f.NoiseKey(1, 2)), drawn((1, 2)))
    assert not torch.equal(drawn((1, 2)), drawn((1, 3)))
    assert torch.equal(drawn(f.NoiseKey(1, 4, 2)), drawn(f.NoiseKey(1, 5, 2)))
    assert torch.equal(drawn(f.NoiseKey(1, 4, 2)), drawn((1, 2)))
    assert torch.equal(f.generate_perturbations(shapes, 4, 2, 0.1, (2**64 - 1, 0))["a"]["U"], drawn((2**64 - 1,)))


@given(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0, float("nan"), float("inf")]), min_size=2, max_size=12))
def test_ranks_are_those_of_core(scores):
    """Ties share their mean rank; what is not finite counts as the worst, as everywhere in eggroll."""
    given_scores = np.array(scores)
    finite = given_scores[np.isfinite(given_scores)]
    mended = np.where(np.isfinite(given_scores), given_scores, finite.min() if finite.size else 0.0)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteFitnessWarning)
        got = f.normalize_fitnesses(torch.tensor(scores))
    np.testing.assert_allclose(got.numpy(), centered_rank(mended), atol=1e-7)


def test_scores_that_are_not_finite_are_counted():
    with pytest.warns(NonFiniteFitnessWarning, match="2 of 3 scores were NaN or infinite"):
        f.normalize_fitnesses(torch.tensor([float("nan"), 1.0, float("inf")]))


def test_splitting_does_not_change_a_step():
    torch.manual_seed(0)
    start = {"w": torch.randn(3, 5), "bias": torch.randn(3)}
    x, target = torch.randn(7, 5), torch.randn(7, 3)

    def fitness(params, perts):
        y = f.perturbed_forward(x[None], params["w"], params["bias"], perts, "w")
        return -(y - target).square().mean((1, 2))

    results = []
    for members in (None, 4, 3):
        params = {key: value.clone() for key, value in start.items()}
        config = f.EggrollConfig(population_size=10, rank=2, members_per_forward=members, sigma_decay=0.9, lr_decay=0.9)
        scores = [f.eggroll_step(params, fitness, config, generation) for generation in range(3)]
        results.append((params, torch.stack(scores)))
        assert torch.equal(params["bias"], start["bias"])
    for params, scores in results[1:]:
        torch.testing.assert_close(params["w"], results[0][0]["w"])
        torch.testing.assert_close(scores, results[0][1])


def test_it_learns():
    """A linear map from scores alone: the error of 12 entries falls to a hundredth in 150 generations."""
    torch.manual_seed(1)
    truth, x = torch.randn(3, 4), torch.randn(32, 4)
    params = {"w": torch.zeros(3, 4)}

    def fitness(params, perts):
        return -(f.perturbed_forward(x[None], params["w"], None, perts, "w") - x @ truth.T).square().mean((1, 2))

    config = f.EggrollConfig(population_size=64, rank=2, sigma=0.05, lr=1.0, lr_decay=0.98)
    for generation in range(150):
        f.eggroll_step(params, fitness, config, generation)
    assert (params["w"] - truth).square().mean() < 0.01 * truth.square().mean()


def test_bfloat16_steps_below_half_a_spacing_are_not_lost():
    """Steps of a hundredth of the spacing: 4,000 of them move 1,000 weights by 40 spacings on average, within 1 %.

    The sum of 4e6 roundings of variance 0.01 * 0.99 spacings has a standard deviation of 0.0063 per weight's average.
    """
    spacing = 2.0**-7
    params = {"w": torch.ones(10, 100, dtype=torch.bfloat16)}
    grads = {"w": torch.full((10, 100), spacing / 100)}
    source = generator()
    for _ in range(4000):
        f.update_params(params, grads, 1.0, generator=source)
    moved = (params["w"].double() - 1).mean() / spacing
    assert abs(moved - 40) < 0.4


class Queries(nn.Module):
    """A learned table that is not perturbed, with as many rows as there may be rows of members."""

    def __init__(self):
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.randn(8, 6)), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.layer(self.queries).mean(0)


@pytest.mark.parametrize("batch", [2, 3])
def test_parameters_of_other_memory_are_no_rows(batch):
    """4 members of 2 rows are as many as the table has, and ``params`` are not the module's own tensors."""
    torch.manual_seed(0)
    module = Queries().eval()
    params = {name: value.clone() for name, value in f.get_params_dict(module).items()}
    perts = f.generate_perturbations({"layer.weight": (6, 6)}, 4, 1, 0.5, f.NoiseKey(0))
    x = torch.randn(batch, 6)
    got = f.make_perturbed_forward_fn(module)(x[None], params, perts)
    for p in range(4):
        member = {**params, "layer.weight": materialized(params["layer.weight"], perts, "layer.weight", p).float()}
        torch.testing.assert_close(got[p], torch.func.functional_call(module, member, (x,)), rtol=1e-4, atol=1e-5)


def test_a_module_in_training_mode_is_refused():
    for module in (nn.Sequential(nn.Linear(3, 3), nn.Dropout()), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))):
        params = f.get_params_dict(module)
        perts = f.generate_perturbations({"0.weight": (3, 3)}, 4, 1, 0.5, f.NoiseKey(0))
        with pytest.raises(UnsupportedOperationError, match=r"in training mode.*Call model.eval\(\) first"):
            f.make_perturbed_forward_fn(module)(torch.zeros(1, 2, 3), params, perts)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rank", [2, 17])
def test_autocast_makes_what_it_makes_of_plain_products(shared, rank):
    torch.manual_seed(0)
    weight, x = torch.randn(5, 6), torch.randn(1 if shared else 4, 3, 6)
    perts = f.generate_perturbations({"w": (5, 6)}, 4, rank, 0.3, generator())
    exact = f.perturbed_forward(x, weight, None, perts, "w")
    with torch.autocast("cpu", torch.bfloat16):
        got = f.perturbed_forward(x, weight, None, perts, "w")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_takes_the_dtype_of_the_weights(dtype):
    """And is a function of seed and generation, its rounding included."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        params = {"w": torch.randn(3, 4).to(dtype)}
        x = torch.randn(5, 4).to(dtype)
        torch.rand(len(results))  # the state of the global generator does not matter

        def fitness(params, perts, x=x):
            return -f.perturbed_forward(x[None], params["w"], None, perts, "w").square().mean((1, 2))

        for generation in range(3):
            f.eggroll_step(params, fitness, f.EggrollConfig(population_size=8), generation)
        results.append(params["w"])
    assert results[0].dtype == dtype
    assert torch.equal(*results)


@pytest.mark.parametrize("module", ["conv", "lstm", "norm"])
def test_any_module_becomes_a_function_of_its_perturbations(module):
    torch.manual_seed(0)
    made = {
        "conv": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(75, 2)),
        "norm": lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)),
        "lstm": lambda: nn.LSTM(5, 4, batch_first=True),
    }[module]()
    made.eval()
    x = torch.randn({"conv": (3, 2, 5, 5), "norm": (3, 5), "lstm": (3, 6, 5)}[module])
    params = f.get_params_dict(made)
    perts = f.generate_perturbations(f.get_weight_shapes(params), 4, 2, 0.2, f.NoiseKey(3))
    other = {name: value + 0.1 for name, value in params.items()}
    forward, clean = f.make_perturbed_forward_fn(made)
    own = torch.stack([x + p for p in range(4)])
    for weights in (params, other):
        shared, each = forward(x[None], weights, perts), forward(own, weights, perts)
        for p in range(4):
            member = {
                name: materialized(value, perts, name, p).float() if name in perts else value
                for name, value in weights.items()
            }
            for got, inputs in ((shared, x), (each, own[p])):
                expected = torch.func.functional_call(made, member, (inputs,))
                got, expected = (y[0] if isinstance(y, tuple) else y for y in (got, expected))
                torch.testing.assert_close(got[p], expected, rtol=1e-5, atol=1e-5)
        first = clean(x, weights)
        torch.testing.assert_close(first, torch.func.functional_call(made, weights, (x,)))
    one = f.generate_perturbations(f.get_weight_shapes(params), 1, 2, 0.2, f.NoiseKey(3), antithetic=False)
    alone = forward(x[None], params, one)
    assert (alone[0] if isinstance(alone, tuple) else alone).shape[0] == 1


SHAPES = {"w": (3, 4)}


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: f.generate_perturbations(SHAPES, 5, 1, 0.1, generator()),
         r"population_size \(=5\) must be positive and even when antithetic=True; use 6 or antithetic=False"),
        (lambda: f.generate_perturbations(SHAPES, 4, 0, 0.1, generator()), r"rank \(=0\) must be at least 1"),
        (lambda: f.generate_perturbations(SHAPES, 4, 1, -1.0, generator()), r"sigma \(=-1.0\) must be"),
        (lambda: f.generate_perturbations(SHAPES, 4, 1, 0.1, generator(), torch.int32), "must be a floating dtype"),
        (lambda: f.generate_perturbations({"w": (3, 0)}, 4, 1, 0.1, generator()), r"shapes\['w'\] \(=\(3, 0\)\)"),
        (lambda: f.generate_perturbations({}, 4, 1, 0.1, generator()), "shapes is empty"),
        (lambda: f.generate_perturbations(SHAPES, 4, 1, 0.1, 42), r"gen \(=42\) must be a torch.Generator or a Noise"),
        (lambda: f.generate_perturbations(SHAPES, 4, 1, 0.1, (1, 2, 3, 4)), r"must be \(seed, generation\)"),
        (lambda: f.generate_perturbations(SHAPES, 4, 1, 0.1, (-1, 2)), "seed must be at least 0"),
        (lambda: f.get_weight_shapes({"b": torch.zeros(3)}), r"no weight of a linear .*; it has b \(3,\)"),
        (lambda: f.normalize_fitnesses(torch.zeros(1)), r"must be \(population_size,\), at least two; got \(1,\)"),
        (lambda: f.EggrollConfig(population_size=7, rank=0), r"(?s)2 problems.*rank.*population_size \(=7\) must be"),
        (lambda: next(f.split_perturbations({}, 0)), r"members \(=0\) must be at least 1"),
    ],
)  # fmt: skip
def test_errors_say_what_was_given_and_what_is_allowed(call, text):
    with pytest.raises((ConfigError, SelectionError), match=text):
        call()


def test_errors_of_layers():
    weight, kernel = torch.zeros(3, 4), torch.zeros(3, 2, 3, 3)
    perts = f.generate_perturbations({"layer1.weight": (3, 4), "k": (3, 18)}, 4, 1, 0.1, generator())
    for call, text in [
        (lambda: f.perturbed_forward(torch.zeros(4, 1, 4), weight, None, perts, "layer1.wieght"),
         r"no perturbations for 'layer1.wieght'; perts has .*Did you mean 'layer1.weight'"),
        (lambda: f.perturbed_forward(torch.zeros(3, 1, 4), weight, None, perts, "layer1.weight"),
         r"x \(3, 1, 4\) must be \(pop=4, \*batch, in=4\)"),
        (lambda: f.perturbed_forward(torch.zeros(4, 0, 4), weight, None, perts, "layer1.weight"),
         r"x \(4, 0, 4\) is an empty batch; give every member at least one row"),
        (lambda: f.perturbed_forward(torch.zeros(4, 1, 4).double(), weight, None, perts, "layer1.weight"),
         "x is torch.float64, W torch.float32"),
        (lambda: f.perturbed_forward(torch.zeros(4, 1, 4), weight.T, None, perts, "layer1.weight"),
         r"W \(4, 3\) does not fit its perturbations for \(3, 4\)"),
        (lambda: f.perturbed_forward(torch.zeros(4, 1, 4), weight, torch.zeros(1), perts, "layer1.weight"),
         r"the bias \(1,\) must be \(3,\), one for each output"),
        (lambda: f.perturbed_forward(torch.zeros(4, 1, 4), weight, None,
                                     {"w": {"U": torch.zeros(4, 1, 3), "V": torch.zeros(2, 1, 4)}}, "w"),
         r"U \(4, 1, 3\) and V \(2, 1, 4\) must be \(pop, rank, out\)"),
        (lambda: f.make_perturbed_forward_fn(nn.Linear(4, 3))(
            torch.zeros(4, 2, 4), {"Weight": weight}, {"weight": perts["layer1.weight"]}),
         r"params has \['Weight'\], which the module does not have; its parameters are weight, bias"),
        (lambda: f.perturbed_conv2d(torch.zeros(4, 3), kernel, perts, "k"), r"x \(4, 3\) must be \(batch, C, H, W\)"),
        (lambda: f.perturbed_conv2d(torch.zeros(2, 5, 8, 8), kernel, perts, "k"), "has 5 channels"),
        (lambda: f.compute_gradients(torch.zeros(3), perts, 3), "must be those of the 4 members"),
        (lambda: f.update_params({"w": weight}, {"v": weight}, 0.1), "grads has 'v', which is not in params"),
        (lambda: f.update_params({"w": weight}, {"w": torch.zeros(5)}, 0.1), "does not fit"),
        (lambda: f.update_params({"w": weight.half()}, {"w": weight}, 0.1), "'w' is float16"),
        (lambda: f.make_perturbed_forward_fn(nn.Linear(4, 3))(torch.zeros(4, 2, 4), {}, perts),
         r"perts has \['k', 'layer1.weight'\], which the module does not have; its parameters are weight, bias"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            call()
    with pytest.raises(RewardError, match=r"must return a tensor \(4,\).*got \(2,\)"):
        f.eggroll_step({"w": weight}, lambda *_: torch.zeros(2), f.EggrollConfig(population_size=4))
