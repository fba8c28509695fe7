"""The functional API inside ``torch.compile`` without graph breaks, with the results of eager mode."""

import pytest
import torch
from torch.nn import functional as F

from eggroll.torch import functional as f

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def case():
    torch.manual_seed(0)
    params = {"a": torch.randn(8, 5), "bias": torch.randn(8), "k": torch.randn(4, 2, 3, 3)}
    shapes = f.get_weight_shapes(params)
    perts = f.generate_perturbations(shapes, 6, 2, 0.1, f.NoiseKey(0))
    return params, shapes, perts


def compiled(function, backend):
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 2, 3, 5), (1, 4, 5)])
def test_a_linear_layer(case, backend, shape):
    params, _, perts = case

    def forward(x):
        return torch.tanh(f.perturbed_forward(x, params["a"], params["bias"], perts, "a"))

    x = torch.randn(shape)
    torch.testing.assert_close(compiled(forward, backend)(x), forward(x))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (6, 3, 2, 8, 8)])
def test_a_convolution(case, backend, shape):
    params, _, perts = case

    def forward(x):
        return F.relu(f.perturbed_conv2d(x, params["k"], perts, "k", padding=1))

    x = torch.randn(shape)
    torch.testing.assert_close(compiled(forward, backend)(x), forward(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_by_address_for_any_generation(case, backend):
    _, shapes, _ = case

    def draw(generation):
        return f.generate_perturbations(shapes, 6, 2, 0.1, f.NoiseKey(2**64 - 3, generation))

    function = compiled(draw, backend)
    for generation in (0, 1, 5, 6):
        got, expected = function(generation), draw(generation)
        for key in shapes:
            assert torch.equal(got[key]["U"], expected[key]["U"])
            assert torch.equal(got[key]["V"], expected[key]["V"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generation_as_one_graph(case, backend):
    """Draw, forward, fitness, gradients, update in place: one graph, the same parameters afterwards."""
    params, _, _ = case
    x = torch.randn(4, 5)

    def generation(weights, number):
        shapes = f.get_weight_shapes(weights)
        perts = f.generate_perturbations(shapes, 6, 2, 0.1, f.NoiseKey(1, number))
        y = f.perturbed_forward(x[None], weights["a"], None, perts, "a")
        fitness = f.normalize_fitnesses(-y.square().mean((1, 2)))
        f.update_params(weights, f.compute_gradients(fitness, perts, 6), 0.1)
        return fitness

    mine, theirs = {"a": params["a"].clone()}, {"a": params["a"].clone()}
    function = compiled(generation, backend)
    for number in range(3):
        torch.testing.assert_close(function(mine, number), generation(theirs, number))
    torch.testing.assert_close(mine["a"], theirs["a"])
    assert not torch.equal(mine["a"], params["a"])


def test_operations_are_registered_as_they_should_be(case):
    """Schemas, fake results and dispatch of the two operations, by PyTorch's own checker."""
    from eggroll.torch.functional.forward import linear_op
    from eggroll.torch.functional.perturbations import normals_at

    params, _, perts = case
    checks = ("test_schema", "test_faketensor")
    arguments = (torch.randn(6, 3, 5), params["a"], params["bias"], perts["a"]["U"], perts["a"]["V"])
    torch.library.opcheck(linear_op, arguments, test_utils=checks)
    torch.library.opcheck(normals_at, ("w", 0, 42, 3, 2, 4, 5, 2, torch.device("cpu")), test_utils=checks)
