"""What a model does with tensors while it is probed: which parameters it uses, and which numbers it reads off them.

A forward of rows takes one path through the model's code. Where that path is chosen by numbers of the activations
(``if h.mean() > 0``, ``h * float(h.max())``), one member's rows would decide for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from eggroll.torch.layout.rules import address, is_constant
from eggroll.torch.ops.registry import METADATA, name_of
from eggroll.torch.ops.routing import picks_rows
from eggroll.torch.perturbed import MemberContext, Value
from eggroll.torch.quantized.tensor import stored

READS = frozenset(
    getattr(owner, name)
    for owner, names in (
        (Tensor, "__bool__ __float__ __int__ __index__ __complex__ __format__ item tolist equal allclose is_nonzero"),
        (torch, "equal allclose is_nonzero"),
    )
    for name in names.split()
    if hasattr(owner, name)
)
"""Functions that give a number of Python's. (``numpy()`` and the like give arrays, which are not looked at.)"""


LOOKS_FOR = frozenset({torch.where, torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere})
"""Functions that give the numbers of entries which have some property (``where`` of one argument)."""


@dataclass
class Read:
    """A number that the model read off floating-point activations.

    Attributes:
        function: by which it was read.
        value: what it got.
        margin: for a comparison of two numbers, how far they were apart; otherwise the numbers that were read;
            ``None`` where a truth value was made from many numbers.
    """

    function: str
    value: Any
    margin: float | list[Any] | None

    def altered(self) -> Any:
        """Something else that it could have been."""
        return _changed(self.value)


def _changed(value: Any) -> Any:
    if isinstance(value, list):
        return [_changed(entry) for entry in value]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 1.5 + 1 if isinstance(value, float | complex) else value


class Originals:
    """Finds the perturbed parameter that a tensor is, or is a view of: the center, which values stand in for.

    Args:
        parameters: the perturbed parameters by name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        for name, parameter in parameters.items():
            held = stored(parameter)
            start = held.data_ptr()
            stop = start + held.nbytes
            if memory := address(held):
                self._spans.setdefault(memory, []).append((start, stop, name))

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter's name, if it is one."""
        tensor = stored(tensor)
        spans = self._spans.get(address(tensor)) if tensor.layout == torch.strided else None
        if not spans or not tensor.numel():
            return None
        start = tensor.data_ptr()
        return next((name for first, last, name in spans if first <= start < last), None)


class Watch(TorchFunctionMode):
    """Sees every torch function that a model calls.

    Args:
        context: of the values in the model.
        originals: the perturbed parameters.
        alter: the place of a read whose number is to be another one.

    Attributes:
        used: names of the parameters whose values an operation got.
        bypassed: names of those whose centers one got.
        reads: the numbers that were read off floating-point tensors.
        picked: whether rows were picked by numbers that were looked for, or in another order than member by member.
    """

    def __init__(self, context: MemberContext, originals: Originals, *, alter: int | None = None) -> None:
        super().__init__()
        self._context, self._originals, self._alter = context, originals, alter
        self._margins: Any = WeakIdKeyDictionary()  # truth values made from floating-point tensors
        self.used: set[str] = set()
        self.bypassed: set[str] = set()
        self.reads: list[Read] = []
        self._found: Any = WeakIdKeyDictionary()  # numbers of entries that were looked for
        self.picked = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if isinstance(tensor, Value):
                self.used.add(tensor.parameter)
            elif name := self._originals.name_of(tensor):
                self.bypassed.add(name)
        self.picked = self.picked or picks_rows(self._context, func, args, self._found)
        result = func(*args, **kwargs)
        if func in LOOKS_FOR:
            self._found.update((x, True) for x in tree_leaves(result) if isinstance(x, Tensor))
        if func in READS:
            return self._read(func, tensors, result)
        if type(result) is Tensor and result.dtype == torch.bool:
            self._remember(tensors, result)
        return result

    def _read(self, func: Any, tensors: list[Tensor], result: Any) -> Any:
        floating = [x for x in tensors if not isinstance(x, Value) and (x.is_floating_point() or x.is_complex())]
        if not floating and not any(x in self._margins for x in tensors):
            return result  # a mask, a length, an index
        margin = self._margins[tensors[0]] if not floating else None
        if margin is None and floating and len(floating) == 1:
            margin = floating[0].tolist()
        self.reads.append(Read(name_of(func), result, margin))
        return self.reads[-1].altered() if self._alter == len(self.reads) - 1 else result

    def _remember(self, tensors: list[Tensor], result: Tensor) -> None:
        """A truth value that floating-point activations decide."""
        if any(x in self._margins for x in tensors if not isinstance(x, Value)):
            known = [self._margins[x] for x in tensors if not isinstance(x, Value) and x in self._margins]
            self._margins[result] = known[0] if len(tensors) == 1 and result.numel() == 1 else None
            return
        floating = [x for x in tensors if not isinstance(x, Value) and x.is_floating_point()]
        if not floating or all(is_constant(self._context, x) for x in floating):
            return
        if result.numel() == 1 and all(x.numel() == 1 for x in floating):
            first, *others = (float(x) for x in floating)
            self._margins[result] = first - others[0] if others else first
        else:
            self._margins[result] = None
