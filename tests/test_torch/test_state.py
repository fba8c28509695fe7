"""Whatever a model keeps from one call to the next passes from no member to another, and stays in no model."""

import collections
import functools
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll.errors import EggrollError, UnsupportedOperationError
from eggroll.torch import Population


class Holder:
    """An object of a model's own, with attributes."""

    def __init__(self):
        self.kept, self.calls = {}, 0


class Slotted:
    __slots__ = ("calls", "held")

    def __init__(self):
        self.calls = 0


class Keeps(nn.Module):
    """Two layers; ``keep(model, hidden)`` may store anything and gives what the second layer gets."""

    in_the_class = {}  # noqa: RUF012

    def __init__(self, keep):
        super().__init__()
        self.first, self.second, self.keep = nn.Linear(4, 4), nn.Linear(4, 2), keep
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.cache, self.list, self.deque, self.set, self.holder = {}, [], collections.deque(), set(), Holder()
        self.slotted, self.array, self.plain = Slotted(), np.zeros(3), torch.zeros(4)
        self.pair = ({}, [1])
        self.steps, self.generator = 0, torch.Generator()
        self.outside = [nn.Linear(4, 4, bias=False)]  # not a registered module

    def forward(self, x):
        return self.second(self.keep(self, torch.tanh(self.first(x))))

    @functools.lru_cache  # noqa: B019
    def doubled(self):
        return self.first.weight * 2.0


def cached(store):
    """The second product's weight is made once and kept."""

    def keep(model, hidden):
        weight = store(model).setdefault("w", model.first.weight.t() * 2)
        return hidden @ weight

    return keep


def in_a_list(model, hidden):
    if not model.list:
        model.list.append(model.first.weight * 2)
    return F.linear(hidden, model.list[0])


def in_a_deque(model, hidden):
    model.deque.append(model.first.bias * 2)
    return hidden + model.deque[0]


def in_slots(model, hidden):
    if not hasattr(model.slotted, "held"):
        model.slotted.held = model.first.bias * 2
    model.slotted.calls += 1
    return hidden + model.slotted.held * model.slotted.calls


def in_an_attribute_with_a_flag(model, hidden):
    if not model.steps:
        model.plain, model.steps = model.first.bias * 3, 1
    return hidden + model.plain


def in_a_cached_method(model, hidden):
    return F.linear(hidden, model.doubled())


def in_a_module_outside(model, hidden):
    linear = model.outside[0]
    if "done" not in linear.__dict__:
        linear.done = model.first.bias + 1
    return hidden + linear.done


CACHES = {
    "dictionary": cached(lambda model: model.cache),
    "object": cached(lambda model: model.holder.kept),
    "class": cached(lambda model: Keeps.in_the_class),
    "inside_a_tuple": cached(lambda model: model.pair[0]),
    "list": in_a_list,
    "deque": in_a_deque,
    "slots": in_slots,
    "attribute": in_an_attribute_with_a_flag,
    "lru_cache": in_a_cached_method,
    "module_in_a_list": in_a_module_outside,
}


def running_mean(model, hidden):
    model.mean.mul_(0.5).add_(hidden.mean(0).detach())
    return hidden - model.mean


def running_mean_through_data(model, hidden):
    model.mean.data.copy_(model.mean * 0.5 + hidden.mean(0))
    return hidden - model.mean


def plain_tensor(model, hidden):
    model.plain += hidden.mean(0)
    return hidden + model.plain


def array(model, hidden):
    model.array += 1.0
    return hidden * float(model.array.sum())


def counter(model, hidden):
    model.calls += 1
    model.steps += 1
    model.holder.calls += 1
    model.set.add(model.steps)
    return hidden * (model.calls + model.steps + model.holder.calls + len(model.set))


def moved_memory(model, hidden):
    model.mean.data = torch.full((4,), float(model.mean[0]) + 1.0, dtype=hidden.dtype)
    return hidden + model.mean


def own_generator(model, hidden):
    return hidden + torch.rand(4, generator=model.generator, dtype=hidden.dtype)


def state_of_last_call(model, hidden):
    previous = model.cache.get("h")
    model.cache["h"] = hidden
    return hidden if previous is None else hidden + previous


STATES = {
    f.__name__: f
    for f in (
        running_mean, running_mean_through_data, plain_tensor, array, counter, moved_memory, own_generator,
        state_of_last_call,
    )
}  # fmt: skip


def snapshot(model):
    """Everything that the model holds, as values."""

    def plain(x):
        if isinstance(x, torch.Tensor):
            return x.detach().double().numpy().tolist()
        if isinstance(x, dict):
            return {str(key): plain(value) for key, value in x.items()}
        if isinstance(x, list | tuple | collections.deque):
            return [plain(value) for value in x]
        return sorted(x) if isinstance(x, set) else x.tolist() if isinstance(x, np.ndarray) else x

    names = ("cache", "list", "deque", "set", "plain", "array", "pair", "steps", "mean", "calls")
    held = {name: plain(getattr(model, name)) for name in names}
    slots = (model.slotted.calls, hasattr(model.slotted, "held"))
    return held, plain(model.holder.__dict__), slots, plain(model.generator.get_state()), dict(Keeps.in_the_class)


def expected(make, population, x, weights_of, generation):
    """Every member as plain weights in a model of its own that was never called."""
    outputs = []
    for p, part in enumerate(x.chunk(population.population_size)):
        model = make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights_of(population, p, generation)[name])
        outputs.append(model(part))
        Keeps.in_the_class.clear()
        Keeps.doubled.cache_clear()
    return torch.cat(outputs)


def maker(filled, keep):
    def make():
        torch.manual_seed(1)
        return filled(Keeps(keep)).double()

    return make


@pytest.mark.parametrize("mode", ["loop", "auto", "perturbed"])
@pytest.mark.parametrize("name", [*CACHES, *STATES])
def test_members_do_not_share_what_the_model_keeps(name, mode, filled, weights_of):
    make = maker(filled, {**CACHES, **STATES}[name])
    model = make()
    population = Population(model, population_size=4, sigma=0.1, mode="auto" if mode == "perturbed" else mode)
    before = snapshot(model)
    x = torch.randn(8, 4, dtype=torch.float64)
    for generation in (0, 1):
        try:
            if mode == "perturbed":
                with population.perturbed(generation) as active:
                    got = active.split(model(x)).flatten(0, 1)
            else:
                got = population.forward(x, generation=generation)
        except UnsupportedOperationError:
            assert mode == "perturbed"
            assert name in STATES
            assert snapshot(model) == before
            continue
        assert snapshot(model) == before
        torch.testing.assert_close(
            got, expected(make, population, x, weights_of, generation), rtol=1e-6, atol=1e-7, check_dtype=False
        )


def test_a_block_changes_nothing_and_its_calls_see_each_other(filled):
    """Inside a block, state goes from call to call as it does in the plain model; the check before is no call."""
    make = maker(filled, counter)
    model, plain = make(), make()
    population = Population(model, population_size=4, sigma=0.1)
    before = snapshot(model)
    with population.perturbed(0):
        for _ in range(2):
            model(torch.randn(8, 4, dtype=torch.float64))
            plain(torch.randn(2, 4, dtype=torch.float64))
            assert snapshot(model) == snapshot(plain)
    assert snapshot(model) == before


def test_an_exception_leaves_nothing_behind(filled):
    def fails(model, hidden):
        counter(model, hidden)
        model.mean += 1.0
        model.cache["w"] = model.first.weight * 2
        raise ZeroDivisionError

    model = maker(filled, fails)()
    population = Population(model, population_size=4)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), population.perturbed(0):
            model(torch.randn(4, 4, dtype=torch.float64))
        assert snapshot(model) == before


def test_hooks_are_their_owners(filled):
    """A hook that is removed during a block stays removed, one that is added stays."""
    model = maker(filled, counter)()
    population = Population(model, population_size=4)
    removed = model.first.register_forward_hook(lambda *_: None)
    with population.perturbed(0):
        removed.remove()
        added = model.second.register_forward_hook(lambda *_: None)
    assert not model.first._forward_hooks
    assert list(model.second._forward_hooks) == [added.id]


def test_a_tensor_that_is_written_to_for_the_first_time_later(filled):
    """Without a copy there is no way back: that is said, and the next time there is one."""

    def late(model, hidden):
        if next(calls) > 4:
            model.mean += 1.0
        return hidden + model.mean

    calls = itertools.count()
    model = maker(filled, late)()
    population = Population(model, population_size=2, mode="loop")
    x = torch.randn(2, 4, dtype=torch.float64)
    population.forward(x, generation=0)
    next(calls), next(calls), next(calls)
    with pytest.raises(EggrollError, match="changed 'mean' in place during an evaluation"):
        population.forward(x, generation=0)
    before = model.mean.clone()
    population.forward(x, generation=0)
    assert torch.equal(model.mean, before)


class Recorder:
    """What a user attaches to a model: its hooks keep what they saw."""

    def __init__(self):
        self.seen, self.calls = [], 0

    def hook(self, module, inputs, output):
        self.seen.append(output)
        self.calls += 1


def test_hooks_do_not_remember_the_check(filled):
    """The check calls hooks too, since they may change outputs; what they keep of it is taken back."""
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    recorder, in_closure, count = Recorder(), [], 0

    def counting(module, inputs):
        nonlocal count
        count += 1
        in_closure.append(inputs[0].shape)

    model.register_forward_hook(recorder.hook)
    model[1].register_forward_pre_hook(counting)
    model[0].register_forward_hook(lambda module, inputs, output: output * 2.0)
    population = Population(model, population_size=4, sigma=0.1)
    with population.perturbed(0):
        out = model(torch.randn(8, 4))
    assert [x is out for x in recorder.seen] == [True]
    assert (recorder.calls, count, in_closure) == (1, 1, [(8, 4)])


def test_state_of_a_model_that_is_a_graph(filled):
    traced = torch.fx.symbolic_trace(filled(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
    population = Population(traced, population_size=4, sigma=0.1)
    assert population.verify(torch.randn(8, 4)) < 1e-5
