"""What an engine is: the integer model, fast, bit for bit the arithmetic of :mod:`eggroll.pretrain.model.oracle`.

All members share the weights, so a step of a chunk of members is a few int8 products of ``(members, n)`` with
``(n, m)``, to which every member adds its low-rank term. On CPUs with AVX2 or AVX-512 VNNI a C library does this,
compiled at first use, with a chunk's activations in the cache; on CUDA one Triton kernel
(:mod:`eggroll.pretrain.engines.triton`); elsewhere :mod:`eggroll.pretrain.engines.torch`, in plain PyTorch. Results do
not depend on the chunks, the threads, or which of the three it is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from eggroll.errors import DataError, MemoryBudgetError
from eggroll.pretrain.model.noise import Noise
from eggroll.pretrain.model.shape import ModelShape

Backend = Literal["auto", "c", "torch"]
Output = Literal["fitness", "likelihood", "logits", "state"]
FITNESS: tuple[Output, ...] = ("fitness",)
LOGITS: tuple[Output, ...] = ("logits",)
STATE: tuple[Output, ...] = ("state",)
MOMENTUM_ONE = 256
"""One standard deviation of an update's sum in the momentum."""


@dataclass(frozen=True)
class Work:
    """What to run: members with windows of tokens.

    Attributes:
        tokens: ``(W, T + 1)`` uint8 windows; the last token of each is only a target.
        window: ``(M,)`` which window a row of the result has.
        pairs: ``(M,)`` which draw, or ``None``: the model itself.
        signs: ``(M,)`` 1 or -1, or ``None``.
        generation: of the draws.
        state: ``(W, L, D)`` int8 before the first token, or ``None`` for zeros.
        outputs: which results to compute.
    """

    tokens: NDArray[np.uint8]
    window: NDArray[np.int32]
    pairs: NDArray[np.int64] | None = None
    signs: NDArray[np.int32] | None = None
    generation: int = 0
    state: NDArray[np.int8] | None = None
    outputs: Collection[Output] = FITNESS


@dataclass(frozen=True)
class Result:
    """The results of :class:`Work`; outputs that were not asked for are ``None``.

    Attributes:
        fitness: ``(M,)`` int32, sum of the log likelihood over the window, sixteenths of a bit.
        likelihood: ``(M, T)`` int32.
        logits: ``(M, T, V)`` int8.
        state: ``(M, L, D)`` int8 after the last input.
    """

    fitness: NDArray[np.int32] | None = None
    likelihood: NDArray[np.int32] | None = None
    logits: NDArray[np.int8] | None = None
    state: NDArray[np.int8] | None = None


@dataclass(frozen=True)
class Step:
    """How the sums of an update become steps (:mod:`eggroll.pretrain.update` makes these).

    Attributes:
        limit: a weight moves by one where the magnitude of the sum (or of the momentum) is at least this and not 0.
        unit: one standard deviation of the sum.
        momentum_shift: momentum is ``m - m / 2^shift + 256 z / unit``, both to the nearest integer; 0 is none.
        sign_of_noise: whether draws count as 16, 0 or -16 in the sum.
    """

    limit: int
    unit: int = 1
    momentum_shift: int = 0
    sign_of_noise: bool = False


class Engine(Protocol):
    """A model that can be evaluated and moved; ``params`` (NumPy int8) is changed in place by ``update``."""

    params: dict[str, NDArray[np.int8]]
    shape: ModelShape
    noise: Noise
    momentum: dict[str, NDArray[np.int32]]

    def run(self, work: Work) -> Result:
        """Evaluate."""
        ...

    def update(self, generation: int, pairs: NDArray[np.int64], fitness: NDArray[np.int8], step: Step) -> int:
        """Move the weights; returns how many have moved.

        Args:
            generation: of the draws.
            pairs: ``(P,)`` which draws.
            fitness: ``(P,)`` int8 in sixteenths, so 16 is 1.0.
            step: the rule.
        """
        ...

    def reload(self) -> None:
        """Read ``params`` again, after they were changed from outside."""
        ...


def run_center(
    engine: Engine, tokens: NDArray[np.uint8], state: NDArray[np.int8] | None = None, *, outputs: Collection[Output]
) -> Result:
    """The model itself over windows ``(W, T + 1)``, a row each."""
    rows = np.arange(len(tokens), dtype=np.int32)
    return engine.run(Work(tokens, rows, state=state, outputs=outputs))


def run_members(
    engine: Engine,
    generation: int,
    members: NDArray[np.integer[Any]],
    tokens: NDArray[np.uint8],
    window: NDArray[np.integer[Any]],
    state: NDArray[np.int8] | None = None,
    *,
    outputs: Collection[Output] = FITNESS,
) -> Result:
    """Members of the population: ``2k`` and ``2k + 1`` have draw ``k`` with the signs 1 and -1.

    Args:
        engine: the model.
        generation: of the draws.
        members: ``(M,)``.
        tokens: ``(W, T + 1)`` uint8.
        window: ``(M,)`` the window of each.
        state: ``(W, L, D)``, or ``None``.
        outputs: which results to compute.
    """
    numbers = np.asarray(members, np.int64)
    signs = (1 - 2 * (numbers % 2)).astype(np.int32)
    work = Work(tokens, np.asarray(window, np.int32), numbers // 2, signs, generation, state, outputs)
    return engine.run(work)


def check_work(work: Work, shape: ModelShape) -> None:
    """Check shapes and ranges: the C engine would read out of bounds.

    Raises:
        DataError: windows, tokens or states do not fit the model or each other.
    """
    tokens, window, state = work.tokens, work.window, work.state
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise DataError(f"tokens must be windows (W, T + 1) of at least one input and a target; got {tokens.shape}")
    if tokens.size and shape.vocab < 256 and int(tokens.max()) >= shape.vocab:
        raise DataError(f"tokens must be from 0 to {shape.vocab - 1}; got up to {tokens.max()}")
    if len(window) and not 0 <= int(window.min()) <= int(window.max()) < len(tokens):
        raise DataError(f"window must be from 0 to {len(tokens) - 1}; got {window.min()} to {window.max()}")
    form = (len(tokens), shape.n_layers, shape.hidden)
    if state is not None and (state.shape != form or state.dtype != np.int8):
        raise DataError(f"state must be int8 (W, L, D) = {form}; got {state.dtype} {state.shape}")


def empty_result(work: Work, shape: ModelShape) -> Result:
    """Arrays for what ``work`` asks for.

    Raises:
        MemoryBudgetError: they do not fit.
    """
    members, steps = len(work.window), work.tokens.shape[1] - 1
    forms: dict[str, tuple[tuple[int, ...], Any]] = {
        "fitness": ((members,), np.int32),
        "likelihood": ((members, steps), np.int32),
        "logits": ((members, steps, shape.vocab), np.int8),
        "state": ((members, shape.n_layers, shape.hidden), np.int8),
    }
    try:
        made = {name: np.zeros(*forms[name]) for name in work.outputs}
    except MemoryError as error:
        raise MemoryBudgetError(f"{members} members x {steps} tokens do not fit into memory ({error})") from None
    return Result(**cast(dict[str, Any], made))
