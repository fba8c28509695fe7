"""At the end of a run: the weights that it leaves, those of the best held-out score or the last ones."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Mapping
from typing import Any

from eggroll._command import typed
from eggroll.errors import CheckpointError
from eggroll.lifecycle.kind import Plan
from eggroll.loop import Loop
from eggroll.run.keeping import Keep, Kept
from eggroll.run.run_dir import RunDir


def keep_of(options: Any) -> Keep:
    """``best`` or ``last``; kinds of runs that have no such option leave the last weights."""
    return "best" if getattr(options, "keep", "last") == "best" else "last"


def choose(plan: Plan, run: RunDir, loop: Loop) -> tuple[Kept, Mapping[str, Any] | None]:
    """What a run leaves, and its state if that is not the one that the worker holds.

    The best generation has a checkpoint since it was evaluated. A run that was started without one (by an older
    version, or with another ``--keep``) may lack it: then the last weights are left, with a warning.
    """
    standing, done = loop.standing, loop.applied
    last = Kept.last(done, standing, stopped_early=loop.stopped_early)
    best = standing.best
    if keep_of(plan.options) != "best" or best is None:
        return last, None
    kept = Kept("best", best[0], done, standing, loop.stopped_early)
    if best[0] == done:
        return kept, None
    try:
        return kept, run.checkpoint_of(best[0]).load()
    except CheckpointError as error:
        warnings.warn(
            f"the weights of the best generation, {best[0]}, are not in a checkpoint, so the last ones are saved: "
            f"{error}. This rebuilds the best ones: {typed()} replay {shlex.quote(str(run.path))} --to {best[0]}",
            stacklevel=2,
        )
        return last, None
