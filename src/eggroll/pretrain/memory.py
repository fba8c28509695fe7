"""What ``eggroll pretrain`` is about to take of a machine's memory."""

from __future__ import annotations

from eggroll.pretrain.config import PretrainOptions
from eggroll.pretrain.engines.c import CHUNK
from eggroll.pretrain.model.shape import MLP_FACTOR
from eggroll.pretrain.worker import PART

FLOAT_MEMBERS = 256
"""Members that share a forward pass in floating point, if not given."""


def members_at_once(options: PretrainOptions) -> int:
    """Members that are evaluated together by a thread."""
    given = options.members_per_forward or (CHUNK if options.precision == "int8" else FLOAT_MEMBERS)
    return min(given, options.population_size)


def parts_of(options: PretrainOptions) -> dict[str, int]:
    """Bytes by what they are for."""
    shape, members = options.shape, members_at_once(options)
    length = options.context + options.tokens + 1
    drawn = sum(parameter.draw_length(options.rank) for parameter in shape.parameters)
    part = min(PART, options.population_size)
    integer = options.precision == "int8"
    element = {"int8": 1, "bf16": 2, "fp32": 4}[options.precision]
    # An update sums in 32 bits; Adam has two moments and the masters of 16 bit.
    weights = shape.size * (element + 4 + 4 * (options.momentum_shift > 0) if integer else element + 16)
    rows = members if integer else members * length  # the integer model goes byte by byte
    widest = max(MLP_FACTOR * shape.hidden, shape.vocab)
    return {
        "weights and update": weights,
        "noise table": options.noise_table_size if integer and options.noise == "table" else 0,
        "members at once": members * drawn * (1 if integer else 4) + rows * widest * 4 * 4,
        "windows": part * (length + 16 + 8 * len(shape.parameters)),
        "scores of all members": 32 * options.population_size,
    }


def ways_out(options: PretrainOptions) -> list[str]:
    """What would make a run smaller, the strongest first."""
    found = [] if options.members_per_forward is None else ["fewer members at once (--members-per-forward)"]
    return [*found, "a smaller population (-p)", "a smaller model (--hidden, --n-layers)", "a shorter --context"]
