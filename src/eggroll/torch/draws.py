"""Random numbers that a model draws of its own, in evaluation mode: each member gets its own, by address.

A member's draws depend on the seed, the generation, the member and their order, never on who is evaluated beside it or
before it. So members in rows, and one by one, see the same numbers, and an evaluation can be repeated.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from eggroll.torch.perturbed import MemberContext
from eggroll.torch.state import random_numbers_kept


class Draws(TorchDispatchMode):
    """Inside it, every random operation draws for each member by itself.

    Args:
        seed: of the run.
        generation: of the members.
        members: gives them in the order of their rows.
        context: of their values; what has no rows is drawn once, as the first member's.

    Attributes:
        count: random operations so far.
        others: whether Python's or NumPy's random numbers were drawn.
    """

    def __init__(
        self, seed: int, generation: int, members: Callable[[], Sequence[int]], context: MemberContext
    ) -> None:
        super().__init__()
        self.address, self.members, self.context = (seed, generation), members, context
        self.count, self.others = 0, False

    @contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """Around a call of the model: all global sources draw by address, and are as before afterwards."""
        with random_numbers_kept(device):
            seed = self._seed(self.members()[0])
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 (the global source, which the model may draw from)
            before = global_state(device)[1:]
            with self:
                yield
            self.others |= before != global_state(device)[1:]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        self.count += 1
        parts = self._parts(func, args)
        if parts is None:
            self._seed(self.members()[0])
            return func(*args, **kwargs)
        dim, cut = parts
        results = []
        for member, own in zip(self.members(), cut, strict=True):
            self._seed(member)
            results.append(func(*own, **kwargs))
        if func._schema.is_mutable:
            return args[0]
        if isinstance(results[0], Tensor):
            return torch.cat(results, dim)
        return tuple(torch.cat(outputs, dim) for outputs in zip(*results, strict=True))

    def _seed(self, member: int) -> int:
        text = repr((*self.address, int(member), self.count)).encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        torch.manual_seed(seed)
        return seed

    def _parts(self, func: Any, args: tuple[Any, ...]) -> tuple[int, list[tuple[Any, ...]]] | None:
        """The dimension that holds the members, and the arguments of each; ``None`` if none does."""
        count, rows = len(self.members()), self.context.rows
        if self.context.single or not rows:
            return None
        names = [argument.name for argument in func._schema.arguments]
        tensors = [x for x in args if isinstance(x, Tensor) and x.ndim]
        size = args[names.index("size")] if "size" in names and len(args) > names.index("size") else None
        shape = list(tensors[0].shape) if tensors else size
        if not shape:
            return None
        dim = next((dim for dim in (self.context.batch_dim, 0, 1) if len(shape) > dim and shape[dim] == rows), None)
        if dim is None:
            if shape[0] == 0 or shape[0] % rows:
                return None
            dim = 0
        own = shape[dim] // count

        def part(p: int) -> Callable[[Any], Any]:
            def of(x: Any) -> Any:
                if isinstance(x, Tensor):
                    return x.narrow(dim, p * own, own) if x.ndim > dim and x.shape[dim] == shape[dim] else x
                return [own if d == dim else n for d, n in enumerate(shape)] if x is size else x

            return of

        return dim, [tuple(map(part(p), args)) for p in range(count)]


def global_state(device: torch.device) -> tuple[Tensor, Any, bytes]:
    """Where the global sources of random numbers are: PyTorch's, Python's, and NumPy's."""
    state = torch.get_rng_state()
    if device.type == "cuda":
        state = torch.cat([state, torch.cuda.get_rng_state(device)])
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return state, random.getstate(), np.asarray(keys).tobytes() + str(position).encode()
