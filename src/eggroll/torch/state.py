"""What a model holds besides its parameters, and how it is put back: attributes, buffers, caches, counters.

Model code may keep anything from one call to the next: tensors made from its weights in a dictionary, running means in
a buffer, a list of past activations, a counter in an object of its own. None of it may pass from one member to the
next, or stay in the model. :class:`Keeper` walks everything that is reachable from the modules and gives it back.

References are kept, not copies, except of tensors that the model writes to in place. Which ones these are is found out
the first time: then, all tensors are copied and compared.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import random
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eggroll.errors import EggrollError
from eggroll.torch.perturbed import Value

COPY_BYTES = 256 * 2**20
"""The first time, smaller tensors are copied before larger ones, up to this much; the rest shows by its version."""

_ATOMS = frozenset({
    bool, int, float, complex, str, bytes, type(None), type(Ellipsis), slice, range, type, torch.dtype, torch.device,
    torch.Size, types.ModuleType, types.BuiltinFunctionType,
})  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
"""Registered hooks: they are their owner's to remove, so they are looked into but not put back."""
_FOREIGN = (
    "torch.", "eggroll.torch.", "logging", "threading", "weakref", "_weakref", "asyncio", "concurrent.",
    "multiprocessing", "enum",
)  # fmt: skip
_CACHE = type(functools.lru_cache(len))


class StateLostError(EggrollError):
    """The model is no longer the center, so that no other mode is tried. (No ``UnsupportedOperationError``.)"""


class Keeper:
    """Keeps the state of one model. It learns which tensors the model writes to, so one is made for each population.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._written: dict[int, Tensor] = {}
        self._is_first = True

    def state(self, *, thorough: bool = False, hooks: bool = False) -> State:
        """What the model holds now.

        Args:
            thorough: copy all tensors, as is done the first time in any case.
            hooks: also what the functions registered as hooks keep (in closures and in their objects).
        """
        state = State(self.model, self._written, thorough=thorough or self._is_first, hooks=hooks)
        self._is_first = False
        return state


class State:
    """What a model holds at one moment; see :class:`Keeper`, which makes it."""

    def __init__(self, model: nn.Module, written: dict[int, Tensor], *, thorough: bool, hooks: bool) -> None:
        self._model, self._written, self._hooks = model, written, hooks
        self._seen: dict[int, Any] = {}  # holds the objects, so that no address is used twice
        self._dicts: list[tuple[dict[Any, Any], list[Any], list[Any], frozenset[str]]] = []
        self._undo: list[Callable[[], None]] = []
        self._caches: list[Any] = []
        self._tensors: list[tuple[Tensor, Any]] = []
        self._walk(model)
        self._copies = self._copied(thorough)
        self._clear_caches()

    def restore(self, *, strict: bool = True) -> None:
        """Give everything back.

        Raises:
            StateLostError: a tensor was written to of which there is no copy (with ``strict``).
        """
        for held in self._dicts:
            _refill_dict(*held)
        for undo in self._undo:
            undo()
        self._clear_caches()
        lost = []
        for tensor, mark in self._tensors:
            copy = self._copies.get(id(tensor))
            if copy is not None:
                if _write_back(tensor, *copy):
                    self._written[id(tensor)] = tensor
            elif _mark(tensor) != mark:
                self._written[id(tensor)] = tensor
                lost.append(tensor)
        if lost and strict:
            raise StateLostError(
                f"the model changed {', '.join(map(self._name_of, lost[:3]))} in place during an evaluation, for the "
                "first time and without a copy to go back to: load the model anew. An evaluation must not change it"
            )

    def _name_of(self, tensor: Tensor) -> str:
        for names in (self._model.named_buffers, self._model.named_parameters):
            for name, held in names(remove_duplicate=False):
                if held is tensor:
                    return repr(name)
        return f"a tensor of shape {tuple(tensor.shape)} that it holds"

    def _copied(self, thorough: bool) -> dict[int, tuple[Tensor, Tensor]]:
        """For tensors that may be written to: the memory that they have now, and a copy of its contents."""
        chosen = [tensor for tensor, _ in self._tensors if id(tensor) in self._written]
        if thorough:
            left = COPY_BYTES
            for tensor, _ in sorted(self._tensors, key=lambda pair: pair[0].numel()):
                left -= tensor.numel() * tensor.element_size()
                if left < 0:
                    break
                chosen.append(tensor)
        copies = {}
        with torch.no_grad():
            for tensor in chosen:
                with contextlib.suppress(RuntimeError, NotImplementedError):  # layouts that cannot be copied
                    copies[id(tensor)] = (tensor.detach(), tensor.detach().clone())
        return copies

    def _clear_caches(self) -> None:
        """What ``functools.lru_cache`` keeps of a model's methods: it would hold what another member computed."""
        for cache in self._caches:
            cache.cache_clear()

    # What is reachable. A plain loop: models nest deeper than Python's stack.

    def _walk(self, root: Any) -> None:
        todo, seen = [root], self._seen
        while todo:
            found = todo.pop()
            kind = type(found)
            if kind in _ATOMS or id(found) in seen:
                continue
            seen[id(found)] = found
            if isinstance(found, dict):
                todo += self._dict(found)
            elif isinstance(found, Tensor):
                if not isinstance(found, Value):
                    self._tensors.append((found, _mark(found)))
            elif isinstance(found, nn.Module):
                todo += self._object(found)
            elif isinstance(found, list):
                todo += self._sequence(found, _refill_list)
            elif isinstance(found, collections.deque):
                todo += self._sequence(found, _refill_deque)
            elif isinstance(found, set):
                todo += self._set(found)
            elif isinstance(found, tuple | frozenset):
                todo += found
            elif isinstance(found, np.ndarray):
                self._array(found)
            elif isinstance(found, _CACHE):
                self._caches.append(found)
            elif isinstance(found, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
                self._undo.append(_generator(found))
            elif isinstance(found, _FUNCTIONS):
                if self._hooks:
                    todo += self._function(found)
            elif not isinstance(found, type):
                todo += self._object(found)

    def _object(self, found: Any) -> Iterable[Any]:
        kind = type(found)
        is_module = isinstance(found, nn.Module)
        if isinstance(found, torch.jit.ScriptModule):
            return ()
        if not is_module and kind.__module__.startswith(_FOREIGN):
            return ()
        reached: list[Any] = []
        attributes = getattr(found, "__dict__", None)
        if type(attributes) is dict:
            self._seen[id(attributes)] = attributes
            reached += self._dict(attributes, skip=_HOOKS if is_module else frozenset())
            if self._hooks and is_module:
                reached += [
                    hook for name in _HOOKS for hook in (attributes.get(name) or ()) and attributes[name].values()
                ]
        slots = _slots(kind)  # type: ignore[arg-type]
        if slots:
            held = {name: getattr(found, name) for name in slots if hasattr(found, name)}
            self._undo.append(functools.partial(_refill_slots, found, slots, held))
            reached += held.values()
        if is_module:
            reached += _class_state(kind)  # type: ignore[arg-type]
        return reached

    def _dict(self, found: dict[Any, Any], skip: frozenset[str] = frozenset()) -> Iterable[Any]:
        keys, values = list(found), list(found.values())
        self._dicts.append((found, keys, values, skip))
        if not skip:
            return values
        return [value for key, value in zip(keys, values, strict=True) if type(value) not in _ATOMS and key not in skip]

    def _sequence(self, found: Any, refill: Callable[[Any, list[Any]], None]) -> Iterable[Any]:
        held = list(found)
        self._undo.append(functools.partial(refill, found, held))
        return held

    def _set(self, found: set[Any]) -> Iterable[Any]:
        held = set(found)
        self._undo.append(functools.partial(_refill_set, found, held))
        return held

    def _array(self, found: np.ndarray[Any, Any]) -> None:
        if found.nbytes <= 2**20 and found.flags.writeable and found.dtype != object:
            self._undo.append(functools.partial(np.copyto, found, found.copy()))

    def _function(self, found: Any) -> Iterable[Any]:
        """What a hook keeps: in its closure, its object, its defaults, and in global names that it assigns or fills."""
        if isinstance(found, functools.partial):
            return (found.func, found.args, found.keywords)
        if isinstance(found, types.MethodType):
            return (found.__self__, found.__func__)
        if found.__module__.startswith(_FOREIGN):
            return ()
        reached: list[Any] = [found.__defaults__, found.__kwdefaults__, found.__dict__]
        for cell in found.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                reached.append(cell.cell_contents)
                self._undo.append(functools.partial(setattr, cell, "cell_contents", cell.cell_contents))
        for name in found.__code__.co_names:
            held = found.__globals__.get(name)
            if isinstance(held, dict | list | set | collections.deque | collections.Counter):
                reached.append(held)
            elif type(held) in (bool, int, float, str, type(None)) and name in found.__globals__:
                self._undo.append(functools.partial(_refill_name, found.__globals__, name, held))
        return reached


def _mark(tensor: Tensor) -> Any:
    """What shows that a tensor was written to, resized or given other memory."""
    try:
        return tensor._version, tensor.data_ptr(), tensor.shape
    except (RuntimeError, NotImplementedError):
        return None  # inference tensors have no version, some layouts no address


def _write_back(tensor: Tensor, memory: Tensor, copy: Tensor) -> bool:
    """Give a tensor its memory and contents back; whether anything had changed."""
    mode = torch.inference_mode() if tensor.is_inference() else torch.no_grad()
    with mode:
        now, before = _mark(tensor), _mark(memory)
        moved = now is not None and before is not None and now[1:] != before[1:]
        if moved:
            tensor.data = memory
        if moved or not _same_bits(tensor, copy):
            memory.copy_(copy)
            return True
    return False


def _same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, NaNs among them."""
    x = x.detach()
    if torch.equal(x, y):
        return True
    return x.dtype.is_floating_point and bool(((x == y) | (x.isnan() & y.isnan())).all())


def _refill_dict(found: dict[Any, Any], keys: list[Any], values: list[Any], skip: frozenset[str]) -> None:
    if (
        len(found) == len(keys)
        and all(map(operator.is_, found, keys))
        and all(map(operator.is_, found.values(), values))
    ):
        return
    kept = {name: found[name] for name in skip & found.keys()}
    kind = collections.OrderedDict if isinstance(found, collections.OrderedDict) else dict
    kind.clear(found)
    kind.update(found, zip(keys, values, strict=True))
    kind.update(found, kept)


def _refill_list(found: list[Any], held: list[Any]) -> None:
    if len(found) != len(held) or not all(map(operator.is_, found, held)):
        list.__setitem__(found, slice(None), held)


def _refill_deque(found: collections.deque[Any], held: list[Any]) -> None:
    if len(found) != len(held) or not all(map(operator.is_, found, held)):
        found.clear()
        found.extend(held)


def _refill_set(found: set[Any], held: set[Any]) -> None:
    if found != held:
        found.clear()
        found.update(held)


def _refill_slots(found: Any, slots: tuple[str, ...], held: dict[str, Any]) -> None:
    for name in slots:
        now = getattr(found, name, _NOTHING)
        before = held.get(name, _NOTHING)
        if now is not before:
            if before is _NOTHING:
                object.__delattr__(found, name)
            else:
                object.__setattr__(found, name, before)


def _refill_name(names: dict[str, Any], name: str, held: Any) -> None:
    names[name] = held


_NOTHING = object()


def _generator(found: Any) -> Callable[[], None]:
    """What sets a source of random numbers back to where it is."""
    if isinstance(found, torch.Generator):
        return functools.partial(found.set_state, found.get_state())  # type: ignore[return-value]
    if isinstance(found, random.Random):
        return functools.partial(found.setstate, found.getstate())
    if isinstance(found, np.random.RandomState):
        return functools.partial(found.set_state, found.get_state())
    return functools.partial(setattr, found.bit_generator, "state", found.bit_generator.state)


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    """Names that objects of a class hold outside of a dictionary."""
    if kind.__flags__ & (1 << 8) and not hasattr(kind, "__slots__"):  # built in, and cannot be looked into
        return ()
    names: list[str] = []
    for base in kind.__mro__:
        own = base.__dict__.get("__slots__", ())
        for name in (own,) if isinstance(own, str) else own:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in names if isinstance(getattr(kind, name, None), types.MemberDescriptorType))


@functools.cache
def _class_state(kind: type) -> tuple[Any, ...]:
    """Containers and caches that a model's class holds for all its objects."""
    return tuple(
        held
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for name, held in vars(base).items()
        if not name.startswith("__") and isinstance(held, dict | list | set | collections.deque | _CACHE)
    )


@contextlib.contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Inside the block, drawing random numbers takes nothing from any of the global sources."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global source itself)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
