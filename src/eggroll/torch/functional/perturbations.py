"""Which weights are perturbed, and their perturbations: from a ``torch.Generator``, or by address."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from eggroll.core.select import ParameterSpec
from eggroll.errors import ConfigError, SelectionError
from eggroll.torch.noise import Noise

Perturbations = dict[str, dict[str, Tensor]]
"""``{key: {"U": (P, r, m), "V": (P, r, n)}}``."""


class NoiseKey(NamedTuple):
    """An address of noise: the numbers that :class:`eggroll.torch.Population` draws for the same parameter names.

    A pure function of the address, whatever the device, and the same as in every other part of eggroll
    (docs/noise-spec.md). A plain tuple ``(seed, generation)`` will do.
    """

    seed: int
    generation: int = 0
    noise_reuse: int = 1


def get_weight_shapes(params: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The matrices among ``params``: ``{key: (m, n)}``; convolution kernels as ``(C_out, C_in/groups * k * k)``.

    Vectors (biases, norm scales) have no place in this API and stay as they are; :class:`eggroll.torch.EGGROLL` and
    :class:`eggroll.torch.Population` perturb them too.

    Raises:
        SelectionError: there is no matrix and no kernel.
    """
    shapes = {key: (value.shape[0], math.prod(value.shape[1:])) for key, value in params.items() if value.ndim >= 2}
    if not shapes:
        given = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(params.items())[:5]) or "nothing"
        raise SelectionError(
            f"params has no weight of a linear (2 dimensions) or convolution layer (3 to 5); it has {given}"
        )
    return shapes


def generate_perturbations(
    shapes: Mapping[str, tuple[int, int]],
    population_size: int,
    rank: int,
    sigma: float,
    gen: torch.Generator | NoiseKey | tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | str | None = None,
    antithetic: bool = True,
) -> Perturbations:
    """Perturbations of all weights in one go: ``E_p = U_p^T V_p`` with entries of standard deviation ``sigma``.

    ``U = sigma / sqrt(r) * A^T`` and ``V = B^T`` with iid N(0, 1) entries in ``A`` and ``B`` (EGGROLL section 4).
    Antithetic halves: member ``p + P/2`` has the draw of member ``p`` with the opposite sign (in ``U``).

    Args:
        shapes: from :func:`get_weight_shapes`.
        population_size: P members; even with antithetic halves.
        rank: r; larger than a dimension is allowed.
        sigma: standard deviation of a perturbation's entries.
        gen: a ``torch.Generator`` on any device, which is advanced, or a :class:`NoiseKey`, which draws by address.
        dtype: of the result; numbers are drawn in float32 and rounded once.
        device: of the result; a generator's own, or the CPU with an address, by default.
        antithetic: halves of opposite sign; otherwise every member has a draw of its own.

    Raises:
        ConfigError: sizes or ``gen`` that cannot work.
    """
    _check(shapes, population_size, rank, sigma, dtype, antithetic=antithetic)
    draws = population_size // 2 if antithetic else population_size
    scale = sigma / rank**0.5
    found: Perturbations = {}
    for key, (u, v) in _factors(shapes, draws, rank, gen, device).items():
        u = u * scale
        both = (torch.cat([u, -u]), torch.cat([v, v])) if antithetic else (u.contiguous(), v.contiguous())
        found[key] = {"U": both[0].to(dtype), "V": both[1].to(dtype)}
    return found


def _factors(
    shapes: Mapping[str, tuple[int, int]],
    draws: int,
    rank: int,
    gen: torch.Generator | NoiseKey | tuple[int, ...],
    device: torch.device | str | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """``key -> (A^T, B^T)``, float32 ``(draws, r, m)`` and ``(draws, r, n)``, not scaled."""
    if isinstance(gen, tuple):
        key = _noise_key(gen)
        return _factors_at(shapes, draws, rank, key, torch.device("cpu" if device is None else device))
    if not isinstance(gen, torch.Generator):
        raise ConfigError(f"gen (={gen!r}) must be a torch.Generator or a NoiseKey(seed, generation)")
    size = draws * rank * sum(m + n for m, n in shapes.values())
    numbers = torch.randn(size, generator=gen, device=gen.device)
    if device is not None:
        numbers = numbers.to(device)
    parts = numbers.split([draws * rank * width for shape in shapes.values() for width in shape])
    return {
        key: (parts[2 * i].view(draws, rank, m), parts[2 * i + 1].view(draws, rank, n))
        for i, (key, (m, n)) in enumerate(shapes.items())
    }


def _factors_at(
    shapes: Mapping[str, tuple[int, int]], draws: int, rank: int, key: NoiseKey, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of an address. Inside ``torch.compile`` each weight's draw is one opaque operation."""
    if torch.compiler.is_compiling():
        drawn = {name: _normals_at(name, m, n, draws, rank, key, device) for name, (m, n) in shapes.items()}
    else:
        specs = [ParameterSpec(name, (m, n), "matrix") for name, (m, n) in shapes.items()]
        drawn = Noise(specs, rank, key.seed, key.noise_reuse).draw(key.generation, range(draws), device)
    found = {}
    for name, (m, n) in shapes.items():
        both = drawn[name].view(draws, n + m, rank).transpose(1, 2)
        found[name] = (both[:, :, n:], both[:, :, :n])
    return found


def _normals_at(name: str, m: int, n: int, draws: int, rank: int, key: NoiseKey, device: torch.device) -> Tensor:
    words = (key.seed >> 32, key.seed & 0xFFFFFFFF, key.generation // key.noise_reuse)
    return normals_at(name, *words, draws, m, n, rank, device)


@torch.library.custom_op("eggroll::normals_at", mutates_args=())
def normals_at(
    name: str, seed_hi: int, seed_lo: int, epoch: int, draws: int, m: int, n: int, rank: int, device: torch.device
) -> Tensor:
    """The draws of one matrix, ``(draws, (n + m) r)`` float32, as an operation that ``torch.compile`` keeps whole."""
    noise = Noise([ParameterSpec(name, (m, n), "matrix")], rank, seed_hi << 32 | seed_lo)
    return noise.draw(epoch, range(draws), device)[name]


@normals_at.register_fake
def _(
    name: str, seed_hi: int, seed_lo: int, epoch: int, draws: int, m: int, n: int, rank: int, device: torch.device
) -> Tensor:
    return torch.empty((draws, (n + m) * rank), dtype=torch.float32, device=device)


def split_perturbations(perts: Mapping[str, Mapping[str, Tensor]], members: int) -> Iterator[Perturbations]:
    """The perturbations of ``members`` consecutive members after the other, without copies.

    Evaluating a large population in parts whose activations stay in cache is faster than in one go, and needs less
    memory; the fitness of the parts is concatenated.

    Raises:
        ConfigError: ``members`` is below 1.
    """
    if members < 1:
        raise ConfigError(f"members (={members}) must be at least 1")
    population_size = next(iter(perts.values()))["U"].shape[0]
    for first in range(0, population_size, members):
        part = slice(first, first + members)
        yield {key: {name: factor[part] for name, factor in factors.items()} for key, factors in perts.items()}


def _noise_key(gen: tuple[int, ...]) -> NoiseKey:
    key = gen if isinstance(gen, NoiseKey) else NoiseKey(*gen) if 1 <= len(gen) <= 3 else None
    if key is None or not all(isinstance(word, int) and not isinstance(word, bool) for word in key):
        raise ConfigError(f"gen (={gen!r}) must be (seed, generation): whole numbers")
    if not 0 <= key.seed < 1 << 64 or key.generation < 0 or key.noise_reuse < 1:
        raise ConfigError(
            f"{key}: seed must be at least 0 and below 2**64, generation at least 0, noise_reuse at least 1"
        )
    return key


def _check(
    shapes: Mapping[str, tuple[int, int]],
    population_size: int,
    rank: int,
    sigma: float,
    dtype: torch.dtype,
    *,
    antithetic: bool,
) -> None:
    problems = []
    if population_size < 1 or (antithetic and population_size % 2):
        even = " and even when antithetic=True" if antithetic else ""
        near = f"; use {population_size + 1} or antithetic=False" if population_size > 0 else ""
        problems.append(f"population_size (={population_size}) must be positive{even}{near}")
    if rank < 1:
        problems.append(f"rank (={rank}) must be at least 1")
    if not 0 <= sigma < math.inf:
        problems.append(f"sigma (={sigma}) must be a number of at least 0")
    if not dtype.is_floating_point:
        problems.append(f"dtype (={dtype}) must be a floating dtype")
    if not shapes:
        problems.append("shapes is empty; get_weight_shapes(params) makes it")
    problems += [
        f"shapes[{key!r}] (={tuple(shape)}) must be (out, in), both at least 1; get_weight_shapes(params) makes it so"
        for key, shape in shapes.items()
        if len(shape) != 2 or min(shape) < 1
    ]
    if problems:
        raise ConfigError.from_problems("generate_perturbations", problems)
