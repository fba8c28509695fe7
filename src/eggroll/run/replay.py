"""Rebuilding the weights of any generation from the first ones and the log of updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from eggroll._optional import DISTRIBUTION
from eggroll.core.records import UpdateRecord
from eggroll.core.threefry import NOISE_VERSION
from eggroll.errors import RunError
from eggroll.run.run_dir import RunDir


def replay(
    records: Iterable[UpdateRecord],
    apply: Callable[[UpdateRecord], None],
    *,
    start: int = 0,
    to: int | None = None,
) -> int:
    """Call ``apply`` for the records of generations ``start`` to ``to`` (exclusive), in order.

    Args:
        records: a run's log from its first record on, as :meth:`RunDir.updates` gives it.
        apply: makes one update. The weights it works on are those after ``start`` updates.
        start: updates that the weights already hold: 0 for the base model, or a checkpoint's generation.
        to: updates that they shall hold in the end; ``None`` is all that are logged.

    Returns:
        The updates that the weights hold now.

    Raises:
        RunError: the log ends before ``to``, or a record is missing. Nothing has been applied then.
    """
    log = list(records)
    for expected, record in enumerate(log):
        if record.generation != expected:
            raise RunError(
                f"the log holds generation {record.generation} where {expected} was expected; a part is missing, so "
                "the weights cannot be rebuilt"
            )
    if to is None:
        to = len(log)
    if not 0 <= to <= len(log):
        raise RunError(
            f"generation {to} cannot be rebuilt: the log holds {len(log)} finished generations; choose 0 to {len(log)}"
        )
    if not 0 <= start <= to:
        raise RunError(f"weights after {start} updates cannot be taken to generation {to}: start from an earlier state")
    for record in log[start:to]:
        apply(record)
    return to


def replay_run(run: RunDir, apply: Callable[[UpdateRecord], None], *, start: int = 0, to: int | None = None) -> int:
    """:func:`replay` the log of ``run``, after a check that its noise can be drawn again.

    Raises:
        RunError: as :func:`replay`; or the run was made with another version of the noise specification.
    """
    version = run.environment.get("noise_version", NOISE_VERSION)
    if version != NOISE_VERSION:
        packages = run.environment.get("packages", {})
        eggroll = packages.get(DISTRIBUTION, packages.get("eggroll-es", "unknown"))
        raise RunError(
            f"{run.path} was made with version {version} of the noise specification, this eggroll draws version "
            f"{NOISE_VERSION}; replay it with the eggroll that made it (version {eggroll})"
        )
    return replay(run.updates(), apply, start=start, to=to)
