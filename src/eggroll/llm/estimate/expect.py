"""What a run is about to take, said before it takes it: memory, tokens, and after its first members its time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from eggroll.lifecycle.memory import generation_line, gigabytes
from eggroll.llm.estimate.memory import Estimate, Workload

SLOW_S = 900.0
"""A generation that takes more seconds than this is announced."""


class SlowGenerationWarning(UserWarning):
    """A generation of this size takes very long."""


def expectation(estimate: Estimate, workloads: Sequence[Workload], members: int, memory: int | None) -> str:
    """A line about what each generation takes.

    Args:
        estimate: the run.
        workloads: what a member is evaluated on.
        members: how many are evaluated together.
        memory: bytes of the machine or the card; ``None`` where they are not known.
    """
    size = estimate.config.population_size
    tokens = size * sum(load.rows * load.length for load in workloads)
    peak = max(estimate.memory(load, members).peak for load in workloads)
    line = generation_line(f"{tokens:,} tokens", size, members, peak)
    if memory is not None and peak > memory:
        line += f", which is more than the {gigabytes(memory)} there are: lower --members-per-forward or the population"
    return line


def announce_if_slow(seconds: float, members: int, population_size: int, generations: int) -> None:
    """Warn of a generation that takes very long, as its first members took ``seconds``."""
    whole = seconds * population_size / members
    if whole > SLOW_S and members < population_size:
        warnings.warn(
            f"the first {members} of {population_size:,} members took {seconds:.3g} s, so a generation takes about "
            f"{_duration(whole)} and {generations} of them {_duration(whole * generations)}. A smaller population "
            "(-p), fewer or shorter answers (--batch-size, --max-tokens) and a smaller model take less",
            SlowGenerationWarning,
            stacklevel=3,
        )


def _duration(seconds: float) -> str:
    for limit, unit in ((2 * 86400, "days"), (2 * 3600, "hours")):
        if seconds >= limit:
            return f"{seconds / (limit / 2):,.0f} {unit}"
    return f"{seconds / 60:.0f} minutes"
