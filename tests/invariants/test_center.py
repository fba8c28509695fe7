"""After any evaluation, whatever happened in it, the model is exactly as it was: bits, objects, hooks, attributes."""

import contextlib

import pytest
import torch
from torch import nn

from eggroll.errors import ConfigError, UnsupportedOperationError
from eggroll.torch import Population


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


class Tied(nn.Module):
    """A tied head, a layer used twice, a buffer, and a value kept in an attribute and in a buffer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.tokens.weight
        self.norm, self.again = nn.LayerNorm(8), nn.ModuleList()
        self.again.append(self.norm)
        self.register_buffer("kept", torch.ones(8))
        self.cache, self.other = None, torch.zeros(2)

    def forward(self, x):
        self.cache = self.norm.weight * 2
        self.kept = self.norm.weight * 3
        self.other = self.norm.bias
        self.new = self.tokens.weight
        return self.head(self.again[0](self.tokens(x))) + self.cache


def convolutional():
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 4))


def old_weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.utils.weight_norm(nn.Linear(8, 8)))


MODELS = {
    "recurrent": (Recurrent, (5, 8)),
    "tied": (Tied, (8,)),
    "convolutional": (convolutional, (3, 8)),
    "weight_norm": (old_weight_norm, (8,)),
    "bfloat16": (lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)).bfloat16(), (8,)),
}


class State:
    """Everything about a model that an evaluation could change."""

    def __init__(self, model):
        self.model = model
        self.slots = self._slots()
        self.bits = {id(tensor): tensor.detach().clone() for tensor in self.slots.values() if tensor is not None}
        self.names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.hooks = self._hooks()
        self.attributes = self._attributes()
        self.flat_weights = self._flat_weights()

    def _slots(self):
        slots = {}
        for prefix, module in self.model.named_modules(remove_duplicate=False):
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                slots[prefix, key] = tensor
        return slots

    def _hooks(self):
        return [
            list(hooks)
            for module in self.model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called)
        ]

    def _attributes(self):
        return {
            (prefix, key): value
            for prefix, module in self.model.named_modules()
            for key, value in module.__dict__.items()
            if key not in ("_parameters", "_buffers", "_modules", "_flat_weights") and not key.startswith("_forward")
        }

    def _flat_weights(self):
        modules = [module for module in self.model.modules() if isinstance(module, nn.RNNBase)]
        return [(module._flat_weights, list(module._flat_weights)) for module in modules]

    def check(self):
        assert self._slots().keys() == self.slots.keys()
        for key, tensor in self._slots().items():
            assert tensor is self.slots[key], key
            assert tensor is None or torch.equal(tensor, self.bits[id(tensor)]), key
            assert tensor is None or not hasattr(tensor, "_is_member"), key
        assert [name for name, _ in self.model.named_parameters(remove_duplicate=False)] == self.names
        assert self._hooks() == self.hooks
        now = self._attributes()
        assert now.keys() == self.attributes.keys()
        for key, value in now.items():
            assert value is self.attributes[key], key
        for (flat, weights), (flat_now, weights_now) in zip(self.flat_weights, self._flat_weights(), strict=True):
            assert flat is flat_now
            assert all(before is after for before, after in zip(weights, weights_now, strict=True))


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    build, shape = MODELS[request.param]
    model = build().eval()
    dtype = next(model.parameters()).dtype
    population = Population(model, population_size=4, sigma=0.1, rank=2)
    with torch.no_grad():
        if request.param == "weight_norm":
            model(torch.zeros(1, *shape))  # its attribute holds the weight from here on
        yield population, torch.randn(8, *shape, dtype=dtype), State(model)


class Stop(BaseException):
    """Neither an Exception nor a KeyboardInterrupt."""


@pytest.mark.parametrize("mode", ["rows", "vmap", "loop", "auto"])
def test_after_an_evaluation(case, mode):
    population, x, state = case
    population.mode = mode
    if mode == "vmap" and any(isinstance(module, nn.RNNBase) for module in population.model.modules()):
        pytest.skip("torch.vmap cannot run this layer")
    for generation in range(2):
        population.forward(x, generation=generation)
        state.check()


def test_after_blocks_and_single_members(case):
    population, x, state = case
    with population.perturbed(0) as active:
        population.model(x)
        active.select_rows(torch.tensor([3, 1, 1]))
        population.model(x[:3])
    state.check()
    with population.perturbed(0, range(1, 3)):
        pass
    state.check()
    with population.member(0, 2):
        population.model(x)
    state.check()
    population.verify(x)
    state.check()


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Stop])
@pytest.mark.parametrize("where", ["model", "block", "first_call"])
@pytest.mark.parametrize("how", ["perturbed", "member"])
def test_after_an_evaluation_that_raised(case, error, where, how):
    population, x, state = case
    model = population.model
    last = list(model.modules())[-1]
    calls = 0

    def explode(module, args):
        nonlocal calls
        calls += 1
        if where == "first_call" or calls > 20:
            raise error("in the middle")

    block = population.perturbed(0) if how == "perturbed" else population.member(0, 1)
    handle = None if where == "block" else last.register_forward_pre_hook(explode)

    def evaluate():
        with block:
            for _ in range(30):
                model(x)
            raise error("in the middle")

    with pytest.raises(error, match="in the middle"):
        evaluate()
    if handle is not None:
        handle.remove()
    state.check()
    # and the population is as usable as before
    with population.perturbed(0):
        model(x)
    state.check()


@pytest.mark.parametrize("mode", ["rows", "loop", "auto"])
def test_after_a_forward_whose_model_raises(case, mode):
    population, x, state = case
    population.mode = mode
    with pytest.raises((RuntimeError, ValueError, ConfigError, TypeError)):
        population.forward(x[..., :3], generation=0)
    state.check()
    with pytest.raises(ConfigError, match="multiple of the number of members"), population.perturbed(0):
        population.model(x[:3])
    state.check()


def test_a_block_that_is_left_by_a_generator_or_an_outer_error(case):
    population, x, state = case

    def members():
        with population.perturbed(0):
            yield population.model(x)
            yield population.model(x)

    generator = members()
    next(generator)
    generator.close()
    state.check()
    with contextlib.suppress(ZeroDivisionError), contextlib.ExitStack() as stack:
        stack.enter_context(population.perturbed(0))
        _ = 1 / 0
    state.check()


def test_one_block_at_a_time(case):
    population, x, state = case
    message = "the population is already active; leave the first block before the next"
    with population.perturbed(0):
        for nested in (population.perturbed(1), population.member(0, 1)):
            with pytest.raises(UnsupportedOperationError, match=message), nested:
                pass
        for mode in ("rows", "loop"):
            population.mode = mode
            with pytest.raises(UnsupportedOperationError, match=message):
                population.forward(x, generation=0)
        population.model(x)  # the outer block still holds
    state.check()


def test_two_populations_of_one_model(case):
    population, x, state = case
    other = Population(population.model, population_size=2, sigma=0.5)
    for outer in (population.perturbed(0), population.member(0, 1)):
        with outer:
            inner = pytest.raises(UnsupportedOperationError, match="perturbed by another population already")
            with inner, other.perturbed(0):
                pass
            population.model(x)  # the outer block still holds
    state.check()
    with other.perturbed(0):
        other.model(x)
    state.check()


def test_a_parameter_that_was_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    population = Population(model, population_size=4)
    replacement = nn.Parameter(torch.zeros(4, 4))
    model[1].weight = replacement
    with pytest.raises(UnsupportedOperationError, match=r"parameter '1\.weight' was replaced since the population"):
        population.forward(torch.randn(4, 4), generation=0)
    assert model[1].weight is replacement
    assert Population(model, population_size=4).verify(torch.randn(4, 4)) < 1e-5


def test_training_mode_is_refused_before_anything_is_changed():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)).train()
    state = State(model)
    population = Population(model, population_size=4)
    with pytest.raises(UnsupportedOperationError) as error, population.perturbed(0):
        pass
    assert str(error.value) == (
        "the model is in training mode with 1 (Dropout), 2 (BatchNorm1d): members would differ by more than their "
        "perturbation. Call model.eval() first"
    )
    state.check()
    assert model.training


def test_values_mean_nothing_to_a_state_dict_or_a_pickle(tmp_path):
    model = nn.Linear(4, 4)
    population = Population(model, population_size=4)
    with population.perturbed(0), pytest.raises(UnsupportedOperationError, match="parameter 'weight' is perturbed"):
        torch.save(model.state_dict(), tmp_path / "weights.pt")
    State(model).check()


def test_random_numbers_of_the_caller_are_left_alone(case):
    population, x, state = case
    before = torch.get_rng_state()
    population.verify(x)
    assert torch.equal(before, torch.get_rng_state())
    state.check()


def test_the_center_is_used_again_after_its_update(case):
    """Values are made from the center as it is when a block begins."""
    population, x, _ = case
    for parameter in population.model.parameters():
        parameter.add_(0.5)
    state = State(population.model)
    assert population.verify(x) < 0.5
    state.check()
